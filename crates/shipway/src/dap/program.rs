//! A build's steps as an editor goes through them: each line of the Dockerfile once, inputs first.

use std::collections::BTreeMap;

use shipway_client::{DebugBuild, Step};
use shipway_fault::Result;
use shipway_llb::{Caps, Definition, Graph};
use shipway_oci::Platform;

/// Callers that are shown of a step.
const MAX_CALLERS: usize = 64;

/// A step: the last operation of an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Point {
    /// Index among the graph's vertices.
    vertex: usize,
    /// What it is called in progress.
    pub(super) name: String,
    /// First and last line, from 1.
    pub(super) lines: (i64, i64),
}

/// The steps of a result, in an order in which they can run one by one.
pub(super) struct Program {
    definition: Definition,
    graph: Graph,
    pub(super) points: Vec<Point>,
}

impl Program {
    /// The program of an encoded definition, whose source is called `filename`.
    pub(super) fn of(definition: &[u8], filename: &str) -> Result<Self> {
        let definition = Definition::decode(definition)?;
        let graph = Graph::decode(&definition, &Caps::llb(), &Platform::host())?;
        let points = points(&graph, filename);
        Ok(Self { definition, graph, points })
    }

    /// Runs the step at `at`, unless the cache has its result.
    pub(super) async fn run(&self, build: &DebugBuild, at: usize) -> Result<()> {
        let vertex = &self.graph.vertices[self.points[at].vertex];
        let definition = self.definition.with_head(vertex.digest, 0);
        let definition = shipway_client::Definition::read(&definition.encode())?;
        let state = build.solve(definition).await?;
        build.evaluate(&state).await
    }

    /// The step at `at` before it has run, with what it would see.
    pub(super) async fn step(&self, build: &DebugBuild, at: usize) -> Result<Step> {
        let point = &self.points[at];
        let vertex = &self.graph.vertices[point.vertex];
        let mut states = Vec::new();
        for input in &vertex.inputs {
            let of = &self.graph.vertices[input.vertex];
            let definition = self.definition.with_head(of.digest, input.output);
            let definition = shipway_client::Definition::read(&definition.encode())?;
            states.push(build.solve(definition).await?);
        }
        Step::of_op(&vertex.bytes, &states, point.name.clone())
    }

    /// The steps for which the one at `at` runs: the next that needs it, and so on.
    pub(super) fn callers(&self, at: usize) -> Vec<&Point> {
        let mut callers = Vec::new();
        let mut of = self.points[at].vertex;
        // Those that need a vertex come after it.
        for (n, vertex) in self.graph.vertices.iter().enumerate().skip(of + 1) {
            if callers.len() < MAX_CALLERS && vertex.inputs.iter().any(|i| i.vertex == of) {
                of = n;
                callers.extend(self.points.iter().find(|p| p.vertex == n));
            }
        }
        callers
    }

    /// The first step after `at` that is of another stage than that one.
    pub(super) fn out_of(&self, at: usize) -> usize {
        let stage = |point: &Point| {
            let name = point.name.strip_prefix('[').unwrap_or_default();
            name.split([' ', ']']).next().unwrap_or_default().to_owned()
        };
        let Some(point) = self.points.get(at) else { return at };
        let here = stage(point);
        let rest = self.points.iter().enumerate().skip(at + 1);
        let next = rest.into_iter().find(|(_, other)| stage(other) != here);
        next.map_or(self.points.len(), |(n, _)| n)
    }

    /// The line on which a breakpoint at `line` stops: that of an instruction that has it.
    pub(super) fn line_of(&self, line: i64) -> Option<i64> {
        let has = |point: &&Point| point.lines.0 <= line && line <= point.lines.1;
        self.points.iter().find(has).map(|point| point.lines.0)
    }
}

fn points(graph: &Graph, filename: &str) -> Vec<Point> {
    let Some(source) = &graph.source else { return Vec::new() };
    // The last operation of each instruction.
    let mut last: BTreeMap<(i64, i64), usize> = BTreeMap::new();
    for (n, vertex) in graph.vertices.iter().enumerate() {
        let mut places = source.find(&vertex.digest.to_string());
        let place = places.find(|(file, spans)| file.filename == filename && !spans.is_empty());
        let Some((_, spans)) = place else { continue };
        let first = spans.iter().map(|s| i64::from(s.start.line)).min().unwrap_or_default();
        let end = spans.iter().map(|s| i64::from(s.end.line.max(s.start.line))).max();
        last.insert((first, end.unwrap_or(first)), n);
    }
    let mut points: Vec<Point> = last
        .into_iter()
        .map(|(lines, vertex)| Point { vertex, name: graph.vertices[vertex].name.clone(), lines })
        .collect();
    points.sort_by_key(|point| point.vertex);
    points
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use shipway_fault::{Position, SourceFile};
    use shipway_llb::{ExecDraft, MarshalOptions, SourceLocation, State, VertexOptions};

    use super::*;

    fn at(file: &Arc<SourceFile>, line: i32, name: &str) -> VertexOptions {
        let position = Position { line, character: 0 };
        let span = shipway_fault::Span { start: position, end: position };
        let location = SourceLocation { file: file.clone(), spans: vec![span] };
        VertexOptions { locations: vec![location], ..VertexOptions::named(name) }
    }

    #[test]
    fn steps_come_after_what_they_need_and_know_for_what_they_run() {
        let file = Arc::new(SourceFile { filename: "Dockerfile".into(), ..Default::default() });
        let run = |state: &State, line, name: &str| {
            let exec = ExecDraft { args: vec![name.to_owned()], ..ExecDraft::default() };
            state.run(exec, at(&file, line, name))
        };
        let base = State::image(
            "docker.io/library/a:1",
            "",
            BTreeMap::new(),
            at(&file, 1, "[a 1/3] FROM"),
        );
        let first = run(&base, 2, "[a 2/3] RUN one");
        let last = run(&first, 4, "[b 1/1] RUN two");
        let options = MarshalOptions {
            platform: Platform::host(),
            caps: None,
            local_unique_id: String::new(),
        };
        let definition = last.marshal(&options).unwrap().encode();
        let program = Program::of(&definition, "Dockerfile").unwrap();
        let lines: Vec<_> = program.points.iter().map(|p| p.lines.0).collect();
        assert_eq!(lines, [1, 2, 4]);
        let callers: Vec<_> = program.callers(0).iter().map(|p| p.lines.0).collect();
        assert_eq!(callers, [2, 4]);
        assert_eq!((program.out_of(0), program.out_of(2)), (2, 3));
        assert_eq!((program.line_of(2), program.line_of(3)), (Some(2), None));
        assert!(Program::of(&definition, "other").unwrap().points.is_empty());
    }
}
