//! The lab: namespaces, bridges, servers and clients that tests and `cargo xtask run` share.
pub mod agent;
pub mod boot;
pub mod bpf;
pub mod clock;
pub mod cluster;
pub mod corpus;
pub mod crowd;
pub mod fixture;
pub mod forge;
pub mod guest;
pub mod mutate;
pub mod netns;
pub mod node;
pub mod pcap;
pub mod process;
pub mod report;
pub mod sandbox;
pub mod scene;
pub mod server;
pub mod tmux;
pub mod trace;
pub mod vm;
pub mod watch;
pub mod wire;
pub mod world;

/// A test that owns its world: it runs as the first process of a sandbox.
///
/// ```ignore
/// lab_test! { fn name() { body; Ok(()) } }
/// lab_test! { within Duration::from_secs(300); fn name() { body; Ok(()) } }
/// ```
#[macro_export]
macro_rules! lab_test {
    (within $limit:expr; $($(#[$meta:meta])* fn $name:ident() $body:block)+) => {$(
        #[test]
        $(#[$meta])*
        fn $name() {
            fn body() -> anyhow::Result<()> $body
            $crate::sandbox::test_in_world(module_path!(), stringify!($name), $limit, body);
        }
    )+};
    ($($test:tt)+) => {
        $crate::lab_test! { within std::time::Duration::from_secs(120); $($test)+ }
    };
}
