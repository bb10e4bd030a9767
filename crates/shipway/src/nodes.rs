//! The nodes of a builder: which of them builds for which platform, and connections to them, which
//! are made when they are needed (rows `bx.create`, `bx.o.multinode`).

use std::collections::BTreeMap;

use futures::future::try_join_all;
use shipway_client::{Client, ConnectOptions, Location, TokenSource, WorkerInfo};
use shipway_fault::{Context, Fault, Result};
use shipway_oci::Platform;
use tokio::sync::OnceCell;

use crate::{
    builders::{Builder, Node},
    driver::Driver,
};

/// The nodes of a builder, or the daemon at an address.
pub(crate) struct Nodes {
    builder: String,
    members: Vec<Member>,
}

struct Member {
    name: String,
    /// What the node was created for.
    declared: Vec<Platform>,
    reach: Reach,
    client: OnceCell<Client>,
}

/// How a node is connected to.
enum Reach {
    Address(Location, ConnectOptions),
    Node { driver: Driver, node: Box<Node>, wait: bool, token: Option<TokenSource> },
}

/// What one node builds of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Number of the node.
    pub(crate) node: usize,
    /// Its platforms; none if the target names none.
    pub(crate) platforms: Vec<Platform>,
}

/// How well a node builds for a platform; the smallest is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    /// It was created for it.
    Declared,
    /// It has such a processor, of which this many levels are unused.
    Native(u32),
    /// It was created for another platform that runs it.
    DeclaredCompatible(u32),
    /// Its processor runs programs of this older one.
    Compatible(u32),
    /// It has an emulator.
    Emulated(u32),
}

/// What a node builds for.
#[derive(Clone, Debug, Default)]
struct Offer {
    declared: Vec<Platform>,
    /// The platforms of each worker; the first is that of its processor.
    workers: Vec<Vec<Platform>>,
}

impl Offer {
    fn fit(&self, wanted: &Platform) -> Option<Fit> {
        let declared = self.declared.iter().filter_map(|has| {
            Some(match wanted.rank_for(has)? {
                0 => Fit::Declared,
                rank => Fit::DeclaredCompatible(rank),
            })
        });
        let workers = self.workers.iter().filter_map(|platforms| {
            let native = platforms.first()?;
            let rank = platforms.iter().filter_map(|has| wanted.rank_for(has)).min()?;
            Some(match native.architecture == wanted.architecture {
                true => Fit::Native(rank),
                false if wanted.rank_for(native).is_some() => Fit::Compatible(rank),
                false => Fit::Emulated(rank),
            })
        });
        declared.chain(workers).min()
    }
}

/// The best node for each platform, by number, and how good it is; the first where none is.
fn assign(offers: &[Offer], wanted: &[Platform]) -> Vec<(usize, Option<Fit>)> {
    let best = |platform| {
        let fits = offers.iter().enumerate().filter_map(|(n, o)| Some((o.fit(platform)?, n)));
        fits.min().map_or((0, None), |(fit, n)| (n, Some(fit)))
    };
    wanted.iter().map(best).collect()
}

/// The parts, in the order in which their first platforms are asked for.
fn parts(chosen: &[(usize, Option<Fit>)], wanted: &[Platform]) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for ((node, _), platform) in chosen.iter().zip(wanted) {
        match parts.iter_mut().find(|part| part.node == *node) {
            Some(part) => part.platforms.push(platform.clone()),
            None => parts.push(Part { node: *node, platforms: vec![platform.clone()] }),
        }
    }
    if parts.is_empty() {
        parts.push(Part { node: 0, platforms: Vec::new() });
    }
    parts
}

impl Nodes {
    /// The daemon at an address, filed under the names of Docker's own builder.
    pub(crate) fn at(location: Location, options: ConnectOptions) -> Self {
        let member = Member {
            name: "default".to_owned(),
            declared: Vec::new(),
            reach: Reach::Address(location, options),
            client: OnceCell::new(),
        };
        Self { builder: "default".to_owned(), members: vec![member] }
    }

    /// The nodes of `builder`, if its driver is known; with `wait`, connecting waits until they
    /// answer.
    pub(crate) fn of(builder: Builder, wait: bool, token: Option<TokenSource>) -> Result<Self> {
        let driver = builder.driver()?;
        let member = |node: Node| Member {
            name: node.name.clone(),
            declared: node.platforms.clone().unwrap_or_default(),
            reach: Reach::Node { driver, node: Box::new(node), wait, token: token.clone() },
            client: OnceCell::new(),
        };
        Ok(Self { members: builder.nodes.into_iter().map(member).collect(), builder: builder.name })
    }

    /// Whether there are several.
    pub(crate) fn are_several(&self) -> bool {
        self.members.len() > 1
    }

    /// The names of the builder and of a node, under which builds are filed.
    pub(crate) fn names(&self, node: usize) -> (&str, &str) {
        (&self.builder, &self.members[node].name)
    }

    /// The connection to a node.
    pub(crate) async fn client(&self, node: usize) -> Result<Client> {
        let member = &self.members[node];
        let client = member.client.get_or_try_init(|| async {
            match &member.reach {
                Reach::Address(location, options) => Client::connect(location, options).await,
                Reach::Node { driver, node, wait, token } => {
                    driver.connect(node, *wait, token.clone()).await
                }
            }
        });
        client.await.cloned()
    }

    /// Chooses nodes for the platforms `wanted`: those that were created for them, then those that
    /// have the processor, and emulators only where no other node is left. Nodes are asked only if
    /// what they were created for does not say it.
    pub(crate) async fn choose(&self, wanted: &[Platform]) -> Result<Vec<Part>> {
        if !self.are_several() || wanted.is_empty() {
            return Ok(vec![Part { node: 0, platforms: wanted.to_vec() }]);
        }
        let declared = self
            .members
            .iter()
            .map(|m| Offer { declared: m.declared.clone(), workers: Vec::new() });
        let chosen = assign(&declared.collect::<Vec<_>>(), wanted);
        if chosen.iter().all(|(_, fit)| *fit == Some(Fit::Declared)) {
            return Ok(parts(&chosen, wanted));
        }
        let offers = (0..self.members.len()).map(|n| async move {
            let workers = self.client(n).await?.workers(Vec::new()).await;
            let workers = workers.context(|| format!("ask the node {}", self.members[n].name))?;
            let platforms = |worker: WorkerInfo| worker.platforms;
            Ok::<_, Fault>(Offer {
                declared: self.members[n].declared.clone(),
                workers: workers.into_iter().map(platforms).collect(),
            })
        });
        let chosen = assign(&try_join_all(offers).await?, wanted);
        for ((node, fit), platform) in chosen.iter().zip(wanted) {
            if let Some(Fit::Emulated(_)) = fit {
                tracing::warn!(
                    "{platform} is emulated on the node {}, which takes several times as long: no \
                     node of {} has such a processor",
                    self.members[*node].name,
                    self.builder
                );
            }
        }
        Ok(parts(&chosen, wanted))
    }
}

/// The platforms that the options of a frontend name.
pub(crate) fn platforms_of(attrs: &BTreeMap<String, String>) -> Result<Vec<Platform>> {
    let Some(list) = attrs.get("platform") else { return Ok(Vec::new()) };
    let parse =
        |text: &str| text.parse().map_err(|e| Fault::invalid(format!("the platform {text}: {e}")));
    list.split(',').map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platforms(list: &str) -> Vec<Platform> {
        list.split_whitespace().map(|p| p.parse().expect("a platform")).collect()
    }

    /// A node with what it was created for, and its worker's platforms.
    fn node(declared: &str, worker: &str) -> Offer {
        Offer { declared: platforms(declared), workers: vec![platforms(worker)] }
    }

    #[track_caller]
    fn check(offers: &[Offer], wanted: &str, expected: &str) {
        let wanted = platforms(wanted);
        let shown: Vec<String> = parts(&assign(offers, &wanted), &wanted)
            .iter()
            .map(|part| {
                let all: Vec<String> = part.platforms.iter().map(ToString::to_string).collect();
                format!("{}:{}", part.node, all.join("+"))
            })
            .collect();
        assert_eq!(shown.join(" "), expected);
    }

    #[test]
    fn native_nodes_come_before_emulators() {
        let intel = || node("", "linux/amd64 linux/amd64/v2 linux/386 linux/arm64 linux/arm/v7");
        let arm = || node("", "linux/arm64 linux/arm/v7 linux/arm/v6 linux/amd64");
        check(
            &[intel(), arm()],
            "linux/arm64 linux/amd64 linux/arm/v7 linux/386",
            "1:linux/arm64+linux/arm/v7 0:linux/amd64+linux/386",
        );
        check(&[arm(), intel()], "linux/amd64", "1:linux/amd64");
        // An emulator is better than a node that cannot run it at all.
        check(&[arm(), node("", "linux/amd64 linux/s390x")], "linux/s390x", "1:linux/s390x");
        // A variant is built where the processor has it.
        let newer = node("", "linux/amd64 linux/amd64/v2 linux/amd64/v3");
        check(&[intel(), newer], "linux/amd64/v3", "1:linux/amd64/v3");
        // What a node was created for counts, whatever it runs on.
        check(&[arm(), node("linux/arm64", "linux/amd64")], "linux/arm64", "1:linux/arm64");
        check(&[intel(), node("linux/arm64", "linux/amd64")], "linux/arm/v7", "1:linux/arm/v7");
        // What no node has is left to the first, as is a target without platforms.
        check(&[intel(), arm()], "windows/amd64", "0:windows/amd64");
        check(&[intel(), arm()], "", "0:");
    }

    #[test]
    fn nothing_is_emulated_that_some_processor_runs() {
        let processors = ["linux/amd64", "linux/arm64", "linux/s390x", "linux/riscv64"];
        let all = platforms(&processors.join(" "));
        // Every builder of one to three nodes, each of any processor and with all emulators.
        let nodes: Vec<Offer> = processors
            .iter()
            .map(|own| {
                let others = processors.iter().filter(|p| p != &own);
                let list: Vec<&str> = std::iter::once(own).chain(others).copied().collect();
                node("", &list.join(" "))
            })
            .collect();
        let count = nodes.len();
        for n in 0..count * count * count {
            let picked = [n % count, n / count % count, n / count / count];
            for length in 1..=3 {
                let offers: Vec<Offer> =
                    picked[..length].iter().map(|n| nodes[*n].clone()).collect();
                let chosen = assign(&offers, &all);
                for ((node, fit), wanted) in chosen.iter().zip(&all) {
                    let native = |o: &Offer| o.workers[0][0] == *wanted;
                    assert_eq!(
                        offers.iter().any(native),
                        native(&offers[*node]) && *fit == Some(Fit::Native(0)),
                        "{wanted} of {picked:?}"
                    );
                }
                let built: usize = parts(&chosen, &all).iter().map(|p| p.platforms.len()).sum();
                assert_eq!(built, all.len());
            }
        }
    }
}
