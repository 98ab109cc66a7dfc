//! Machines that boot: kernels as Debian packages them, an initramfs of our own, and qemu.
pub mod initramfs;
pub mod kernel;
pub mod qemu;

pub use initramfs::Initramfs;
pub use kernel::{Kernel, KernelVersion};
pub use qemu::{Accel, Machine, last_words};
