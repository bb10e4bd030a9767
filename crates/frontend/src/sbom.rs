//! Scanners: images that look at a state and write down what is in it (rows `at.sbom.*`).

use crate::{Bridge, BuildAttestation, SolveRequest, SourceRequest};
use shipway_attest::{Attestation, Kind, SPDX, SbomOptions, keys};
use shipway_fault::{Fault, Result};
use shipway_llb::{
    ExecDraft, MarshalOptions, MountDraft, MountSource, ResolveMode, ResolveOptions, State,
    VertexOptions,
};
use shipway_oci::{ImageConfig, Platform};
use std::collections::BTreeMap;

/// What the scan of the result itself is called.
const CORE: &str = "sbom";
const SOURCES: &str = "/run/src/";
const OUT: &str = "/run/out/";

/// A scanner, found and ready to run.
pub struct Scanner {
    /// Name of its image.
    name: String,
    config: ImageConfig,
    args: Vec<String>,
    platform: Platform,
    params: BTreeMap<String, String>,
}

/// What is to be scanned.
pub struct Scan<'a> {
    /// Id of the platform, for progress.
    pub platform: &'a str,
    /// The result.
    pub core: &'a State,
    /// What else is looked at, by name.
    pub extras: &'a BTreeMap<String, State>,
    /// Whether what was found before does not count.
    pub ignore_cache: bool,
}

impl Scanner {
    /// Finds the scanner that is asked for.
    pub async fn find(
        bridge: &dyn Bridge,
        options: &SbomOptions,
        platform: Platform,
        mode: ResolveMode,
    ) -> Result<Self> {
        let identifier = format!("docker-image://{}", options.generator);
        let request = SourceRequest {
            identifier,
            platform: Some(platform.clone()),
            options: ResolveOptions { mode, ..ResolveOptions::default() },
            ..SourceRequest::default()
        };
        let image = bridge.resolve_source(request).await?.facts.image;
        let image =
            image.ok_or_else(|| Fault::internal("a scanner was resolved without its config"))?;
        let config: ImageConfig = serde_json::from_slice(&image.config).map_err(|e| {
            Fault::invalid(format!("the image config of the scanner {} is broken: {e}", image.name))
        })?;
        let args: Vec<String> = config
            .config
            .entrypoint
            .iter()
            .flatten()
            .chain(config.config.cmd.iter().flatten())
            .cloned()
            .collect();
        if args.is_empty() {
            return Err(Fault::invalid(format!("scanner {} does not have cmd", image.name)));
        }
        Ok(Self { name: image.name, config, args, platform, params: options.params.clone() })
    }

    /// The directory of statements that the scanner makes.
    fn output(&self, scan: &Scan<'_>) -> State {
        let core = format!("{SOURCES}core/{CORE}");
        let mut image = State::image(
            &self.name,
            "",
            BTreeMap::new(),
            VertexOptions::default().platform(self.platform.clone()),
        );
        for entry in &self.config.config.env {
            let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
            image = image.add_env(name, value);
        }
        image =
            image.add_env("BUILDKIT_SCAN_DESTINATION", OUT).add_env("BUILDKIT_SCAN_SOURCE", &core);
        if !scan.extras.is_empty() {
            image = image.add_env("BUILDKIT_SCAN_SOURCE_EXTRAS", &format!("{SOURCES}extras"));
        }
        for (name, value) in &self.params {
            image = image.add_env(&format!("BUILDKIT_SCAN_{name}"), value);
        }
        if !self.config.config.working_dir.is_empty() {
            image = image.with_dir(&self.config.config.working_dir);
        }
        let looked_at = |target: String, state: &State| MountDraft {
            target,
            source: MountSource::State(state.clone()),
            readonly: true,
            ..MountDraft::default()
        };
        let mut mounts = vec![
            MountDraft {
                target: "/tmp".into(),
                source: MountSource::Tmpfs(0),
                ..MountDraft::default()
            },
            MountDraft { target: OUT.into(), ..MountDraft::default() },
            looked_at(core, scan.core),
        ];
        mounts.extend(
            scan.extras
                .iter()
                .map(|(name, state)| looked_at(format!("{SOURCES}extras/{CORE}-{name}"), state)),
        );
        let draft = ExecDraft { args: self.args.clone(), mounts, ..ExecDraft::default() };
        let mut options = VertexOptions::named(format!(
            "[{}] generating sbom using {}",
            scan.platform, self.name
        ));
        if scan.ignore_cache {
            options = options.ignore_cache();
        }
        image.run_into(draft, OUT, options)
    }

    /// Scans; the attestation is lazy.
    pub async fn scan(
        &self,
        bridge: &dyn Bridge,
        scan: &Scan<'_>,
        local_unique_id: &str,
    ) -> Result<BuildAttestation> {
        let options = MarshalOptions {
            platform: self.platform.clone(),
            caps: None,
            local_unique_id: local_unique_id.to_owned(),
        };
        let definition = self.output(scan).marshal(&options)?;
        let solved = bridge
            .solve(SolveRequest { definition: Some(definition), ..SolveRequest::default() })
            .await?;
        Ok(Attestation {
            kind: Kind::Bundle,
            path: String::new(),
            metadata: BTreeMap::from([
                (keys::REASON.to_owned(), b"sbom".to_vec()),
                (keys::SBOM_CORE.to_owned(), CORE.as_bytes().to_vec()),
            ]),
            predicate_type: SPDX.into(),
            subjects: Vec::new(),
            content: solved.single.flatten(),
        })
    }
}
