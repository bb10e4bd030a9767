//! Why steps ran, in words: what the daemon says of its cache (`build --explain-cache`, `history
//! explain`).

use std::collections::HashMap;

use shipway_client::{CacheMiss, Status};

/// Steps that are explained; a hostile daemon must not fill our memory.
const MAX_STEPS: usize = 100_000;

/// The steps of a build that ran, with the reason.
#[derive(Default)]
pub(crate) struct Explained {
    /// Names and reasons, in the order in which they came.
    steps: Vec<(String, CacheMiss)>,
    /// Where in `steps` a vertex is.
    places: HashMap<String, usize>,
}

impl Explained {
    /// Takes what an event says. The last reason of a vertex counts.
    pub(crate) fn note(&mut self, status: &Status) {
        for vertex in &status.vertexes {
            let Some(miss) = &vertex.cache_miss else { continue };
            let step = (vertex.name.clone(), miss.clone());
            match self.places.get(&vertex.digest) {
                Some(at) => self.steps[*at] = step,
                None if self.steps.len() < MAX_STEPS => {
                    self.places.insert(vertex.digest.clone(), self.steps.len());
                    self.steps.push(step);
                }
                None => {}
            }
        }
    }

    /// One line for each step, below a headline.
    pub(crate) fn text(&self) -> String {
        // What a build brings along, such as its context, is never in the cache.
        let steps = self.steps.iter().filter(|(_, miss)| !is_brought_along(miss));
        let lines: String =
            steps.map(|(name, miss)| format!(" - {name}: {}\n", reason(miss))).collect();
        match lines.is_empty() {
            true => "No step ran that the cache could have had a result for.\n".to_owned(),
            false => format!("Why steps ran:\n{lines}"),
        }
    }
}

fn is_brought_along(miss: &CacheMiss) -> bool {
    miss.reason == "uncacheable" && miss.inputs.is_empty()
}

fn reason(miss: &CacheMiss) -> String {
    let inputs = miss.inputs.join(", ");
    match miss.reason.as_str() {
        "ignored" if miss.inputs.is_empty() => "the build uses no cache for it".to_owned(),
        "ignored" => format!("the build uses no cache for what it needs: {inputs}"),
        "uncacheable" => format!("what it needs is of this build only: {inputs}"),
        "gone" => "the cache had its result, which was pruned or lost".to_owned(),
        "new" => "the cache knows nothing like it".to_owned(),
        "changed" => changes(miss),
        // Of a newer daemon.
        other => other.to_owned(),
    }
}

fn changes(miss: &CacheMiss) -> String {
    let mut clauses = Vec::new();
    match (miss.operation, miss.parts.is_empty()) {
        (false, _) => {}
        (true, true) => clauses.push("the step itself is another".to_owned()),
        (true, false) => clauses.push(format!("other {}", miss.parts.join(", "))),
    }
    if !miss.contents.is_empty() {
        clauses.push(format!("other files in {}", miss.contents.join(", ")));
    }
    if !miss.inputs.is_empty() {
        clauses.push(format!("another result of {}", miss.inputs.join(", ")));
    }
    format!("not as the last time: {}", clauses.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(events: &[&str], expected: &str) {
        let mut explained = Explained::default();
        for event in events {
            explained.note(&serde_json::from_str(event).expect(event));
        }
        assert_eq!(explained.text(), expected);
    }

    #[test]
    fn reasons_are_words() {
        check(
            &[
                r#"{"vertexes":[{"digest":"c","name":"context","cacheMiss":{"reason":"uncacheable"}},{"digest":"0","name":"cached","cached":true}]}"#,
                r#"{"vertexes":[{"digest":"1","name":"COPY","cacheMiss":{"reason":"new"}}]}"#,
                r#"{"vertexes":[{"digest":"2","name":"RUN a","cacheMiss":{"reason":"changed","operation":true,"parts":["env A","args"],"inputs":["COPY"]}}]}"#,
                // It ran again.
                r#"{"vertexes":[{"digest":"1","name":"COPY","cacheMiss":{"reason":"changed","contents":["context"]}}]}"#,
                r#"{"vertexes":[{"digest":"3","name":"RUN b","cacheMiss":{"reason":"gone"}},{"digest":"4","name":"RUN c","cacheMiss":{"reason":"ignored"}}]}"#,
                r#"{"vertexes":[{"digest":"5","name":"RUN d","cacheMiss":{"reason":"ignored","inputs":["RUN c"]}},{"digest":"6","name":"RUN e","cacheMiss":{"reason":"uncacheable","inputs":["context"]}}]}"#,
                r#"{"vertexes":[{"digest":"7","name":"FROM x","cacheMiss":{"reason":"changed","operation":true}}]}"#,
            ],
            "Why steps ran:
 - COPY: not as the last time: other files in context
 - RUN a: not as the last time: other env A, args; another result of COPY
 - RUN b: the cache had its result, which was pruned or lost
 - RUN c: the build uses no cache for it
 - RUN d: the build uses no cache for what it needs: RUN c
 - RUN e: what it needs is of this build only: context
 - FROM x: not as the last time: the step itself is another
",
        );
        check(&[], "No step ran that the cache could have had a result for.\n");
    }
}
