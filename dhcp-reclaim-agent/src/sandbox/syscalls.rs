//! seccomp: the system calls that a running agent makes, and with which arguments.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::{SandboxError, Strictness};

/// Commands of bpf(2) that stay: to use what was loaded at the start, and to attach it to ports that
/// come later. No program is loaded and no map is made any more.
pub const COMMANDS: [(u32, &str); 10] = [
    (1, "BPF_MAP_LOOKUP_ELEM"),
    (2, "BPF_MAP_UPDATE_ELEM"),
    (3, "BPF_MAP_DELETE_ELEM"),
    (4, "BPF_MAP_GET_NEXT_KEY"),
    (6, "BPF_OBJ_PIN"),
    (7, "BPF_OBJ_GET"),
    (15, "BPF_OBJ_GET_INFO_BY_FD"),
    (28, "BPF_LINK_CREATE"),
    (29, "BPF_LINK_UPDATE"),
    (34, "BPF_LINK_DETACH"),
];

/// Whatever their arguments are.
const PLAIN: &[libc::c_long] = &[
    // Descriptors that are open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_dup,
    // Waiting.
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_clock_nanosleep,
    // Clocks, where the vDSO has none.
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    // Files: Landlock says which.
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fchmod,
    libc::SYS_getdents64,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_getcwd,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Sockets that are open.
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    // Signals, and the end.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // About itself and the machine.
    libc::SYS_getrandom,
    libc::SYS_geteuid,
    libc::SYS_uname,
    libc::SYS_sched_getaffinity,
    libc::SYS_prlimit64,
];

/// Older ways of the same, which this C library still takes.
#[cfg(target_arch = "x86_64")]
const OLDER: &[libc::c_long] = &[
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_unlink,
    libc::SYS_rmdir,
    libc::SYS_rename,
    libc::SYS_readlink,
    libc::SYS_dup2,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[libc::c_long] = &[];

/// Installs the filter in every thread; the inner error says that this kernel has none.
pub(super) fn restrict(
    strictness: Strictness,
) -> Result<Result<(), seccompiler::Error>, SandboxError> {
    let program = filter(strictness).map_err(SandboxError::Filter)?;
    Ok(seccompiler::apply_filter_all_threads(&program))
}

fn filter(strictness: Strictness) -> Result<BpfProgram, BackendError> {
    let refuse = match strictness {
        Strictness::Enforce => SeccompAction::KillProcess,
        Strictness::Log => SeccompAction::Log,
    };
    let arch: TargetArch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules()?, refuse, SeccompAction::Allow, arch)?.try_into()
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let plain = PLAIN.iter().chain(OLDER).map(|call| (*call, Vec::new()));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = plain.collect();

    let commands = COMMANDS
        .iter()
        .map(|(command, _)| rule(&[is(0, *command)?]));
    rules.insert(libc::SYS_bpf, commands.collect::<Result<_, _>>()?);

    // Memory that is written is never run.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let no_exec = has(2, libc::PROT_EXEC.cast_unsigned(), 0)?;
        rules.insert(call, vec![rule(&[no_exec])?]);
    }

    let kind = 0xf; // SOCK_TYPE_MASK of linux/net.h: the rest are flags
    let datagram = libc::SOCK_DGRAM.cast_unsigned();
    let sockets = vec![
        // To ask for an interface's name.
        rule(&[
            is(0, libc::AF_UNIX.cast_unsigned())?,
            has(1, kind, datagram)?,
        ])?,
        // Lease queries.
        rule(&[
            is(0, libc::AF_INET.cast_unsigned())?,
            has(1, kind, datagram)?,
        ])?,
        // Addresses of a bridge, the end of the private link, clsact.
        rule(&[
            is(0, libc::AF_NETLINK.cast_unsigned())?,
            is(2, libc::NETLINK_ROUTE.cast_unsigned())?,
        ])?,
    ];
    rules.insert(libc::SYS_socket, sockets);

    let requests = [SIOCGIFNAME, SIOCGIFINDEX, FIONBIO];
    let requests = requests.iter().map(|request| rule(&[is(1, *request)?]));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);

    // Its own end only, by abort(3).
    let own = rule(&[is(0, std::process::id())?])?;
    rules.insert(libc::SYS_tgkill, vec![own]);
    Ok(rules)
}

const SIOCGIFNAME: u32 = 0x8910;
const SIOCGIFINDEX: u32 = 0x8933;
const FIONBIO: u32 = 0x5421;

fn rule(conditions: &[SeccompCondition]) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.to_vec())
}

fn is(argument: u8, value: u32) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, Dword, SeccompCmpOp::Eq, value.into())
}

/// Of the argument's bits in `mask`, exactly those of `value` are set.
fn has(argument: u8, mask: u32, value: u32) -> Result<SeccompCondition, BackendError> {
    let op = SeccompCmpOp::MaskedEq(mask.into());
    SeccompCondition::new(argument, Dword, op, value.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_can_be_built_for_both_modes() {
        for strictness in [Strictness::Enforce, Strictness::Log] {
            let program = filter(strictness).unwrap();
            assert!(program.len() > PLAIN.len(), "{strictness:?}");
        }
    }

    #[test]
    fn what_would_open_a_door_is_not_in_it() {
        let rules = rules().unwrap();
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_kexec_load,
            libc::SYS_perf_event_open,
            libc::SYS_io_uring_setup,
            libc::SYS_kill,
            libc::SYS_listen,
            libc::SYS_memfd_create,
            libc::SYS_userfaultfd,
            libc::SYS_keyctl,
            libc::SYS_open_by_handle_at,
        ] {
            assert!(!rules.contains_key(&call), "system call {call}");
        }
        const PROG_LOAD: u32 = 5;
        assert!(COMMANDS.iter().all(|(command, _)| *command != PROG_LOAD));
    }
}
