//! Learns which files of a result are read first, from a run of it and from the steps that made
//! it, and puts them in front (row `ex.c.compress`).

use crate::{
    optimize::{Optimize, arguments},
    options::ImageOptions,
    port::{ExportContext, ExportInput, ExportPlatform, base_layers, metadata_of},
    services::ExportServices,
};
use bytes::Bytes;
use parking_lot::Mutex;
use shipway_executor::{
    KeepAlive, OpenedFiles, OutputSink, ProcessIo, ProcessSpec, RootFs, Stream,
};
use shipway_fault::{Class, Code, Fault, Result};
use shipway_oci::{ImageConfig, Platform};
use shipway_progress::LogStream;
use shipway_refs::{Compression, ReadOrder, RecordType, StepReads};
use std::{collections::HashSet, sync::Arc};

/// What runtimes look a container's user up in before it starts.
const RUNTIMES_READ: [&[u8]; 2] = [b"/etc/passwd", b"/etc/group"];
/// Most bytes of the program's output that an error shows.
const MAX_OUTPUT: usize = 2 << 10;

/// `input` as it is exported with `options`: without times later than its epoch, and with what is
/// read first in front, if that is asked for.
pub(crate) async fn prepared(
    options: &ImageOptions,
    input: ExportInput,
    services: &ExportServices,
    cx: &ExportContext,
) -> Result<ExportInput> {
    // Layers with other times are not those that the steps made.
    let learned = match &options.optimize {
        Some(optimize) => Some(optimize.learn(&input, services, cx).await?),
        None => None,
    };
    let input = options.rewritten(input, &cx.reporter).await?;
    match learned {
        Some(learned) => learned.apply(input, options.compression, cx).await,
        None => Ok(input),
    }
}

/// What is read first of a result.
struct Learned {
    /// What the program opened.
    program: ReadOrder,
    /// What steps opened, by platform.
    steps: Vec<Vec<StepReads>>,
}

impl Optimize {
    /// Learns what of `input` is read first.
    async fn learn(
        &self,
        input: &ExportInput,
        services: &ExportServices,
        cx: &ExportContext,
    ) -> Result<Learned> {
        let steps = input.platforms.iter().map(|p| match self.steps {
            true => p.state.step_reads(),
            false => Vec::new(),
        });
        let steps = steps.collect();
        let Some(command) = &self.command else {
            return Ok(Learned { program: [].into(), steps });
        };
        // Files have the same names on other platforms, mostly.
        let runs =
            input.platforms.iter().find(|p| p.platform.rank_for(&Platform::host()).is_some());
        let platform = runs.ok_or_else(|| {
            Fault::invalid("none of the result's platforms can be run here to see what is read")
                .hint("build for this machine's platform as well, or leave optimize out")
        })?;
        let status = format!("running {} to see what is read first", platform.id);
        cx.reporter.status(status.clone(), 0, 0, false);
        let mut program = self.run(command, input, platform, services, cx).await?;
        program.retain(|file| !RUNTIMES_READ.contains(&&file[..]));
        program.splice(0..0, RUNTIMES_READ.map(<[u8]>::to_vec));
        let program = program.into();
        cx.reporter.status(status, 0, 0, true);
        Ok(Learned { program, steps })
    }

    /// What `command` opens in the result.
    async fn run(
        &self,
        command: &str,
        input: &ExportInput,
        platform: &ExportPlatform,
        services: &ExportServices,
        cx: &ExportContext,
    ) -> Result<Vec<Vec<u8>>> {
        let config = metadata_of(&input.metadata, "containerimage.config", &platform.id);
        let config = config.map(serde_json::from_slice::<ImageConfig>).transpose();
        let config = config
            .map_err(|e| Fault::invalid(format!("the image's config cannot be read: {e}")))?
            .unwrap_or_default()
            .config;
        let args = arguments(command, &config.shell, config.entrypoint, config.cmd)?;
        let (name, reporter) = (args.join(" "), Some(&cx.reporter));
        let state = services
            .refs
            .mutable(Some(&platform.state), format!("run of {name}"), RecordType::Regular, reporter)
            .await?;
        let root = RootFs {
            snapshot: Some(state.snapshot_key().clone()),
            mounts: state.mounts().to_vec(),
            read_only: false,
        };
        let opened = OpenedFiles::default();
        let said = Arc::new(Mutex::new(Vec::new()));
        let sink: OutputSink = {
            let (said, reporter) = (said.clone(), cx.reporter.clone());
            Arc::new(move |output| {
                let stream = match output.stream {
                    Stream::Stdout => LogStream::Stdout,
                    Stream::Stderr => LogStream::Stderr,
                };
                reporter.log(stream, &output.bytes);
                keep_last(&mut said.lock(), &output.bytes);
            })
        };
        let process = ProcessSpec {
            id: format!("shipway-optimize-{}", shipway_host::random_id()?),
            group: cx.build.clone(),
            args,
            env: config.env,
            cwd: if config.working_dir.is_empty() { "/".into() } else { config.working_dir },
            user: config.user,
            network: self.network.clone(),
            opened: Some(opened.clone()),
            keep_alive: KeepAlive(Some(Arc::new(state))),
            ..ProcessSpec::default()
        };
        let running = services.executor.run(process, root, Vec::new(), ProcessIo::output(sink));
        match tokio::time::timeout(self.time, running).await {
            // Most services never end, and have read by now what they begin with.
            Err(_) => {}
            Ok(status) => {
                let code = status?.code;
                if code != 0 {
                    let said = String::from_utf8_lossy(&said.lock()).trim().to_owned();
                    let fault = Fault::new(
                        Code::Unknown,
                        format!("{name:?}, run to see what it reads, ended with exit code {code}: {said}"),
                    )
                    .with_class(Class::User);
                    return Err(fault.hint("name another command with optimize=, or give it the network with optimize-network=default"));
                }
            }
        }
        Ok(opened.take())
    }
}

impl Learned {
    /// `input` with layers in that order.
    async fn apply(
        &self,
        mut input: ExportInput,
        compression: Compression,
        cx: &ExportContext,
    ) -> Result<ExportInput> {
        for (p, steps) in input.platforms.iter_mut().zip(&self.steps) {
            let base = base_layers(&input.metadata, &p.id);
            let first = |layer| order(&self.program, steps, layer);
            let status = "putting what is read first in front";
            cx.reporter.status(status, 0, 0, false);
            p.state = p.state.reordered(&base, compression, &first, Some(&cx.reporter)).await?;
            cx.reporter.status(status, 0, 0, true);
        }
        Ok(input)
    }
}

/// What is read first of the layer with number `layer`: what the program opened, then what the
/// steps did that came after the layer.
fn order(program: &ReadOrder, steps: &[StepReads], layer: usize) -> ReadOrder {
    let later = steps.iter().filter(|step| step.below > layer);
    let all = program.iter().chain(later.flat_map(|step| step.files.iter()));
    let mut seen = HashSet::new();
    all.filter(|path| seen.insert(*path)).cloned().collect()
}

/// Adds output of which only the end is of interest.
fn keep_last(said: &mut Vec<u8>, bytes: &Bytes) {
    said.extend_from_slice(&bytes[bytes.len().saturating_sub(MAX_OUTPUT)..]);
    let surplus = said.len().saturating_sub(MAX_OUTPUT);
    said.drain(..surplus);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_counts_for_the_layers_below_it() {
        let paths = |names: &[&str]| -> ReadOrder {
            names.iter().map(|name| name.as_bytes().to_vec()).collect()
        };
        let steps = [
            StepReads { below: 1, files: paths(&["/a", "/b"]) },
            StepReads { below: 2, files: paths(&["/c", "/a"]) },
        ];
        let program = paths(&["/b"]);
        for (layer, want) in [(0, &["/b", "/a", "/c"][..]), (1, &["/b", "/c", "/a"]), (2, &["/b"])]
        {
            assert_eq!(order(&program, &steps, layer), paths(want), "{layer}");
        }
    }

    #[test]
    fn of_long_output_the_end_is_kept() {
        let mut said = Vec::new();
        for n in 0..100_u8 {
            keep_last(&mut said, &Bytes::from(vec![n; 1000]));
        }
        assert_eq!((said.len(), said.last()), (MAX_OUTPUT, Some(&99)));
        keep_last(&mut said, &Bytes::from(vec![7; 10 * MAX_OUTPUT]));
        assert_eq!(said, [7; MAX_OUTPUT]);
    }
}
