//! bpf(2) as it is, for what no library loads or says.
use std::os::fd::{FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    libc::{self, c_long},
};

pub const MAP_UPDATE_ELEM: c_long = 2;
pub const PROG_LOAD: c_long = 5;
pub const MAP_FREEZE: c_long = 22;
pub const LINK_CREATE: c_long = 28;

/// What `union bpf_attr` has at these offsets; the rest is zero. An attribute that is a pointer is its
/// address, and must live for as long as these are used.
pub fn attributes(words: &[(usize, u32)], longs: &[(usize, u64)]) -> [u8; 128] {
    let mut bytes = [0; 128];
    for (at, word) in words {
        bytes[*at..][..4].copy_from_slice(&word.to_ne_bytes());
    }
    for (at, long) in longs {
        bytes[*at..][..8].copy_from_slice(&long.to_ne_bytes());
    }
    bytes
}

/// # Safety
///
/// Every pointer among the attributes is good for the length that goes with it.
pub unsafe fn call(command: c_long, attributes: &[u8]) -> Result<c_long> {
    // SAFETY: the kernel reads as many bytes as it is told; the caller vouches for the pointers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            attributes.len(),
        )
    };
    Errno::result(result).with_context(|| format!("bpf({command})"))
}

/// A call that returns a new descriptor.
///
/// # Safety
///
/// As for [`call`], and it is one that does.
pub unsafe fn open(command: c_long, attributes: &[u8]) -> Result<OwnedFd> {
    // SAFETY: the caller vouches for it.
    let fd = unsafe { call(command, attributes) }?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.try_into()?) })
}
