//! Resource limits of a step (row `so.res`). Builds that share it may want different ones: the
//! widest holds, so that no step is held back by another build.

use shipway_executor::ResourceLimits;
use shipway_llb::LinuxResources;

/// No processor or memory node has a higher number.
const MAX_NODE: u32 = 8191;

/// On the wire zero means that nothing is said.
pub(super) fn of(r: &LinuxResources) -> ResourceLimits {
    ResourceLimits {
        memory: (r.memory != 0).then_some(r.memory),
        memory_swap: (r.memory_swap != 0).then_some(r.memory_swap),
        cpu_shares: (r.cpu_shares != 0).then_some(r.cpu_shares),
        cpu_period: (r.cpu_period != 0).then_some(r.cpu_period),
        cpu_quota: (r.cpu_quota != 0).then_some(r.cpu_quota),
        cpuset_cpus: r.cpuset_cpus.clone(),
        cpuset_mems: r.cpuset_mems.clone(),
    }
}

/// The wider of two, limit by limit.
pub(super) fn wider(a: &LinuxResources, b: &LinuxResources) -> LinuxResources {
    let (cpu_period, cpu_quota) =
        wider_share((a.cpu_period, a.cpu_quota), (b.cpu_period, b.cpu_quota));
    LinuxResources {
        memory: if a.memory == 0 || b.memory == 0 { 0 } else { a.memory.max(b.memory) },
        // Unset follows from the memory, and -1 is without limit.
        memory_swap: match (a.memory_swap, b.memory_swap) {
            (-1, _) | (_, -1) => -1,
            (a, b) => a.max(b),
        },
        // Unset is what the kernel gives, which is not the most.
        cpu_shares: a.cpu_shares.max(b.cpu_shares),
        cpu_period,
        cpu_quota,
        cpuset_cpus: union(&a.cpuset_cpus, &b.cpuset_cpus),
        cpuset_mems: union(&a.cpuset_mems, &b.cpuset_mems),
    }
}

/// Periods with quotas are never mixed. Without a quota there is no limit; of equal ones that with
/// the shorter period is wider.
fn wider_share(a: (u64, i64), b: (u64, i64)) -> (u64, i64) {
    let rate = |(period, quota): (u64, i64), other: (u64, i64)| {
        // Where one says no period, the quotas alone decide.
        i128::from(quota) * if period == 0 || other.0 == 0 { 1 } else { i128::from(other.0) }
    };
    match (a.1, b.1) {
        (0, 0) => (0, 0),
        (0, _) => a,
        (_, 0) => b,
        _ => match rate(a, b).cmp(&rate(b, a)) {
            std::cmp::Ordering::Greater => a,
            std::cmp::Ordering::Less => b,
            std::cmp::Ordering::Equal if b.0 != 0 && (a.0 == 0 || b.0 < a.0) => b,
            std::cmp::Ordering::Equal => a,
        },
    }
}

/// All that one of two lists such as `0-3,5` has; an empty one means no limit. What cannot be read
/// counts for nothing.
fn union(a: &str, b: &str) -> String {
    if a.is_empty() || b.is_empty() {
        return String::new();
    }
    let (Some(mut ranges), Some(more)) = (ranges(a), ranges(b)) else {
        return if ranges(a).is_some() { a } else { b }.to_owned();
    };
    ranges.extend(more);
    ranges.sort_unstable();
    let mut all: Vec<(u32, u32)> = Vec::new();
    for (first, last) in ranges {
        match all.last_mut() {
            Some(open) if first <= open.1 + 1 => open.1 = open.1.max(last),
            _ => all.push((first, last)),
        }
    }
    let shown = |(first, last): &(u32, u32)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    all.iter().map(shown).collect::<Vec<_>>().join(",")
}

fn ranges(list: &str) -> Option<Vec<(u32, u32)>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (first <= last && last <= MAX_NODE).then_some((first, last))
    };
    list.split(',').map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_limit_holds() {
        let of = |memory, memory_swap, cpu_shares| LinuxResources {
            memory,
            memory_swap,
            cpu_shares,
            ..Default::default()
        };
        let check = |a: &LinuxResources, b: &LinuxResources, expected: &LinuxResources| {
            assert_eq!(&wider(a, b), expected);
            assert_eq!(&wider(b, a), expected);
        };
        check(&of(10, 20, 512), &of(30, -1, 0), &of(30, -1, 512));
        check(&of(10, 20, 512), &of(0, 0, 1024), &of(0, 20, 1024));
        let share =
            |cpu_period, cpu_quota| LinuxResources { cpu_period, cpu_quota, ..Default::default() };
        check(&share(100, 50), &share(1000, 600), &share(1000, 600));
        check(&share(100, 50), &share(1000, 500), &share(100, 50));
        check(&share(100, 50), &share(1000, 0), &share(1000, 0));
        check(&share(0, 50), &share(1000, 50), &share(1000, 50));
        check(
            &share(u64::MAX, i64::MAX),
            &share(u64::MAX, i64::MAX - 1),
            &share(u64::MAX, i64::MAX),
        );
        let cpus = |list: &str| LinuxResources { cpuset_cpus: list.into(), ..Default::default() };
        check(&cpus("0-2,7"), &cpus("3,9-10"), &cpus("0-3,7,9-10"));
        check(&cpus("0-2"), &cpus(""), &cpus(""));
        check(&cpus("0-2"), &cpus("0-4294967295"), &cpus("0-2"));
        check(&cpus("0-2"), &cpus("x"), &cpus("0-2"));
    }
}
