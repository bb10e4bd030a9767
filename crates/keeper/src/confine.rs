//! What the process does without, once it serves. Each of it is left out, and said, where it is not
//! permitted or not known.
//!
//! Its pages stay in memory as they are touched (`mlockall`), and its own allocations never wait
//! for file systems to write (`PR_SET_IO_FLUSHER`): a program that waits for a page of a lazy layer
//! may be the one whose memory would have to be written out. System calls are those of [`CALLS`],
//! and any other kills it (seccomp). The program is the table and nothing else.

use crate::sys;
use rustix::{
    mm::{MlockAllFlags, mlockall},
    process::configure_io_flusher_behavior,
    thread::set_no_new_privs,
};

/// System calls of a keeper that serves.
const CALLS: &[i64] = &[
    // Requests, answers, contents.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    // The daemon and the service manager.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_getsockopt,
    libc::SYS_ppoll,
    libc::SYS_pipe2,
    // Layers that come and go.
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_fcntl,
    libc::SYS_close,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_umount2,
    // Memory, locks, clocks, threads that end, signals.
    libc::SYS_brk,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_sched_yield,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// The number of this machine's kind in the kernel's `audit.h`, and the first number of system
/// calls that belong to another of its ways to be called.
#[cfg(target_arch = "x86_64")]
const MACHINE: Option<(u32, u32)> = Some((0xc000_003e, 0x4000_0000));
#[cfg(target_arch = "aarch64")]
const MACHINE: Option<(u32, u32)> = Some((0xc000_00b7, u32::MAX));
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const MACHINE: Option<(u32, u32)> = None;

/// Positions in what the kernel shows a filter (`struct seccomp_data`).
const NUMBER: u32 = 0;
const KIND: u32 = 4;

/// Confines this process for good, all of its threads. The caller has opened, mounted and started
/// what it needs.
pub fn confine() {
    if let Err(error) =
        mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
    {
        tracing::warn!(%error, "failed to lock memory");
    }
    if let Err(error) = configure_io_flusher_behavior(true) {
        tracing::warn!(%error, "failed to exempt this process from waiting under memory pressure");
    }
    let Some((kind, foreign)) = MACHINE else {
        return tracing::warn!("no filter of system calls for this architecture");
    };
    let filtered =
        set_no_new_privs(true).and_then(|()| sys::filter_calls(&mut program(kind, foreign, CALLS)));
    if let Err(error) = filtered {
        tracing::warn!(%error, "failed to filter system calls");
    }
}

/// Allows `calls`, kills for any other.
fn program(kind: u32, foreign: u32, calls: &[i64]) -> Vec<libc::sock_filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let line =
        |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let kill = line(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0);
    let allow = line(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0);
    let mut program = vec![
        line(LOAD, KIND, 0, 0),
        line(EQUAL, kind, 1, 0),
        kill,
        line(LOAD, NUMBER, 0, 0),
        line(AT_LEAST, foreign, 0, 1),
        kill,
    ];
    for call in calls {
        program.extend([line(EQUAL, *call as u32, 0, 1), allow]);
    }
    program.push(kill);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do with the program.
    fn run(program: &[libc::sock_filter], kind: u32, number: u32) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let line = &program[at];
            at += 1;
            match u32::from(line.code) {
                0x20 => value = if line.k == KIND { kind } else { number },
                0x15 => at += usize::from(if value == line.k { line.jt } else { line.jf }),
                0x35 => at += usize::from(if value >= line.k { line.jt } else { line.jf }),
                0x06 => return line.k,
                other => panic!("instruction {other}"),
            }
        }
    }

    #[test]
    fn the_program_allows_the_table_and_nothing_else() {
        let program = program(77, 1000, &[3, 500]);
        for number in 0..1100 {
            let allowed = [3, 500].contains(&number);
            let want =
                if allowed { libc::SECCOMP_RET_ALLOW } else { libc::SECCOMP_RET_KILL_PROCESS };
            assert_eq!(run(&program, 77, number), want, "{number}");
            assert_eq!(run(&program, 78, number), libc::SECCOMP_RET_KILL_PROCESS, "{number}");
        }
    }
}
