//! `cargo xtask bench`: the same builds on our daemon and on any other BuildKit-API address, in
//! turn, medians and ratios. The client is always ours, called as `buildctl`, so that only daemons
//! differ.

mod workloads;

use crate::{cargo, packages};
use shipway_testkit::{BaseImage, Flavour, Lab, LabOptions};
use workloads::{Bench, WORKLOADS};

/// Prepares, builds, and goes on as root.
pub fn run(arguments: &[&str]) -> Result<(), String> {
    Options::parse(arguments)?;
    packages::prepare()?;
    let second: Vec<&str> =
        std::iter::once("bench-as-root").chain(arguments.iter().copied()).collect();
    cargo::build_and_continue("release", &second)
}

#[derive(Debug, PartialEq)]
struct Options {
    runs: usize,
    workloads: Vec<String>,
    /// Names and addresses of other daemons.
    others: Vec<(String, String)>,
}

impl Options {
    fn parse(arguments: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            runs: 3,
            workloads: WORKLOADS.iter().map(|(name, _)| (*name).to_owned()).collect(),
            others: Vec::new(),
        };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match *argument {
                "-n" => {
                    options.runs = rest
                        .next()
                        .and_then(|n| n.parse().ok())
                        .filter(|n| *n > 0)
                        .ok_or("-n wants a number of runs")?
                }
                "-w" => {
                    let names = rest.next().ok_or("-w wants names of workloads")?;
                    options.workloads = names.split(',').map(str::to_owned).collect();
                }
                other => {
                    let (name, address) = other
                        .split_once('=')
                        .ok_or_else(|| format!("{other:?}: want name=address"))?;
                    options.others.push((name.into(), address.into()));
                }
            }
        }
        let known: Vec<&str> = WORKLOADS.iter().map(|(name, _)| *name).collect();
        match options.workloads.iter().find(|w| !known.contains(&w.as_str())) {
            Some(unknown) => {
                Err(format!("unknown workload {unknown:?}; there are {}", known.join(" ")))
            }
            None => Ok(options),
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// The measurements.
pub fn as_root(arguments: &[&str]) -> Result<(), String> {
    let options = Options::parse(arguments)?;
    let flavour = *Flavour::present().last().ok_or("no containerd is installed")?;
    let mut lab = Lab::start(LabOptions::new(flavour));
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    println!(
        "containerd {}, registry {}, shipwayd idle at {} MB",
        flavour.version(),
        lab.registry(),
        lab.daemon().memory() >> 20
    );
    let mut daemons = vec![("shipwayd".to_owned(), lab.daemon_address())];
    // The other daemons must mirror docker.io from our registry, or have busybox already.
    daemons.extend(options.others.iter().cloned());
    let bench = Bench::new(&lab)?;
    for (name, workload) in
        WORKLOADS.iter().filter(|(name, _)| options.workloads.iter().any(|w| w == name))
    {
        let mut measured: Vec<(String, Vec<f64>)> =
            daemons.iter().map(|(daemon, _)| (daemon.clone(), Vec::new())).collect();
        let mut broken = vec![false; daemons.len()];
        // The first round does not count.
        for round in 0..=options.runs {
            for (n, (daemon, address)) in daemons.iter().enumerate() {
                if broken[n] {
                    continue;
                }
                match workload(&bench, daemon, address) {
                    Ok(seconds) if round > 0 => measured[n].1.push(seconds),
                    Ok(_) => {}
                    Err(why) => {
                        println!("{name:18} {daemon:14} FAILED {why}");
                        broken[n] = true;
                    }
                }
            }
        }
        let base =
            measured.iter().find(|(_, v)| !v.is_empty()).map(|(_, v)| median(&mut v.clone()));
        for (daemon, values) in measured.iter_mut().filter(|(_, v)| !v.is_empty()) {
            let (least, most) =
                values.iter().fold((f64::MAX, 0f64), |(l, m), v| (l.min(*v), m.max(*v)));
            let middle = median(values);
            println!(
                "{name:18} {daemon:14} median {middle:8.3}  min {least:8.3}  max {most:8.3}  ratio {:6.2}",
                middle / base.unwrap_or(middle)
            );
        }
    }
    println!("shipwayd now at {} MB", lab.daemon().memory() >> 20);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_wrong_ones_refused() {
        let options = Options::parse(&["-n", "5", "-w", "noop_s,step_s", "bk=unix:///x"]).unwrap();
        assert_eq!(options.runs, 5);
        assert_eq!(options.workloads, ["noop_s", "step_s"]);
        assert_eq!(options.others, [("bk".to_owned(), "unix:///x".to_owned())]);
        assert!(Options::parse(&["-w", "none"]).unwrap_err().contains("noop_s"));
        assert!(Options::parse(&["-n", "0"]).is_err());
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [1.0, 2.0]), 1.5);
    }
}
