//! What the machine did while a build ran, as provenance has it (row `at.prov.params`).

use serde_json::{Map, Value, json};
use shipway_oci::timestamp;
use std::time::SystemTime;

/// The kernel counts processor time in these parts of a second.
const TICKS: f64 = 100.0;
/// Kinds of processor time, in the order of `/proc/stat`.
const CPU: [&str; 10] =
    ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guestNice"];
/// Counters of `/proc/stat`.
const COUNTERS: [(&str, &str); 3] = [
    ("contextSwitches", "ctxt"),
    ("processCreated", "processes"),
    ("processesRunning", "procs_running"),
];
/// Lines of `/proc/meminfo`.
const MEMORY: [(&str, &str); 11] = [
    ("total", "MemTotal"),
    ("free", "MemFree"),
    ("available", "MemAvailable"),
    ("buffers", "Buffers"),
    ("cached", "Cached"),
    ("active", "Active"),
    ("inactive", "Inactive"),
    ("swap", "SwapTotal"),
    ("dirty", "Dirty"),
    ("writeback", "Writeback"),
    ("slab", "Slab"),
];

/// One look at the machine: `/proc/stat`, `/proc/meminfo`, and the pressure on processors, memory
/// and devices where the kernel reports it.
pub fn system_sample(
    at: SystemTime,
    stat: &str,
    meminfo: &str,
    pressure: [Option<&str>; 3],
) -> Value {
    let field = |text: &str, name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok())
    };
    let mut times = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .map(|n| n.parse().unwrap_or(0.0));
    let cpu: Map<_, _> = CPU
        .iter()
        .map(|key| ((*key).to_owned(), json!(times.next().unwrap_or(0.0) / TICKS)))
        .collect();
    let counters: Map<_, _> = COUNTERS
        .iter()
        .map(|(key, name)| {
            ((*key).to_owned(), json!(field(stat, &format!("{name} ")).unwrap_or(0)))
        })
        .collect();
    let memory: Map<_, _> = MEMORY
        .iter()
        .map(|(key, name)| ((*key).to_owned(), json!(field(meminfo, &format!("{name}:")))))
        .collect();
    let mut sample = json!({ "timestamp": timestamp::format(at), "cpuStat": cpu, "procStat": counters, "memoryStat": memory });
    for (key, text) in ["cpuPressure", "memoryPressure", "ioPressure"].into_iter().zip(pressure) {
        if let Some(text) = text {
            sample[key] =
                json!({ "some": pressure_of(text, "some "), "full": pressure_of(text, "full ") });
        }
    }
    sample
}

/// A line such as `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
fn pressure_of(text: &str, kind: &str) -> Option<Value> {
    let line = text.lines().find_map(|l| l.strip_prefix(kind))?;
    let number =
        |name: &str| line.split_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
    let average = |name: &str| number(name).and_then(|n| n.parse::<f64>().ok());
    let total = number("total").and_then(|n| n.parse::<u64>().ok());
    Some(
        json!({ "avg10": average("avg10"), "avg60": average("avg60"), "avg300": average("avg300"), "total": total }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_told() {
        let stat =
            "cpu  150 2 3 4 5 6 7 8 9 10\ncpu0 1 2 3\nctxt 77\nprocesses 5\nprocs_running 2\n";
        let memory = "MemTotal:        1000 kB\nMemFree:          10 kB\nSlab: 3 kB\n";
        let io = "some avg10=1.50 avg60=0.00 avg300=0.00 total=42\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=7\n";
        let sample = system_sample(SystemTime::UNIX_EPOCH, stat, memory, [None, None, Some(io)]);
        assert_eq!(sample["timestamp"], "1970-01-01T00:00:00Z");
        assert_eq!(
            (&sample["cpuStat"]["user"], &sample["cpuStat"]["guestNice"]),
            (&json!(1.5), &json!(0.1))
        );
        assert_eq!(
            sample["procStat"],
            json!({ "contextSwitches": 77, "processCreated": 5, "processesRunning": 2 })
        );
        assert_eq!(
            (&sample["memoryStat"]["total"], &sample["memoryStat"]["dirty"]),
            (&json!(1000), &Value::Null)
        );
        assert_eq!(
            sample["ioPressure"]["full"],
            json!({ "avg10": 0.25, "avg60": 0.0, "avg300": 0.0, "total": 7 })
        );
        assert!(sample.get("cpuPressure").is_none());
    }
}
