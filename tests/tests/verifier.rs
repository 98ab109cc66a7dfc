//! How much the verifier has to do, by kernel: where a program's way got more complex than it was, the
//! next kernel may refuse it.

#[expect(dead_code, reason = "shared with the other suites")]
mod world;

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::MapData;
use aya_obj::{Object, generated::bpf_insn};
use dhcp_reclaim_agent::kernel::{Hook, OBJECT};
use dhcp_reclaim_tests::{
    boot::kernel::{running, unlimit_locked_memory},
    bpf::{MAP_FREEZE, MAP_UPDATE_ELEM, PROG_LOAD, attributes, call, open},
};
use world::{alone, load};

/// Instructions, by program.
type Counts = BTreeMap<String, u32>;

const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/verifier.json");
/// Of `enum bpf_prog_type`.
const PROGRAMS: [(&str, u32); 5] = [
    ("baseline", SCHED_CLS),
    ("emit", SCHED_CLS),
    ("vm_egress", SCHED_CLS),
    ("vm_ingress", SCHED_CLS),
    ("xdp_ingress", XDP),
];
const SCHED_CLS: u32 = 3;
const XDP: u32 = 6;

/// By how much a count may be over what is recorded.
const JUMP: f64 = 1.2;

#[test]
fn the_verifier_has_no_more_to_do_than_is_recorded() {
    alone(|| {
        let (major, minor) = running().unwrap();
        let version = format!("{major}.{minor}");
        let counts = logged();
        println!(
            "NOTE instructions verified: \"{version}\": {}",
            serde_json::to_string(&counts).unwrap()
        );
        let record: BTreeMap<String, Counts> =
            serde_json::from_slice(&fs::read(RECORD).unwrap()).unwrap();
        // The matrix excuses no such skip, also where `newest` has become another: its count is to be seen
        // and written down. Elsewhere kernels come and go.
        let Some(recorded) = record.get(&version) else {
            println!(
                "SKIP the_verifier_has_no_more_to_do_than_is_recorded: {RECORD} has no Linux \
                 {version}: what the NOTE says can go there"
            );
            return;
        };
        assert_eq!(
            recorded.len(),
            PROGRAMS.len(),
            "of Linux {version}, in {RECORD}"
        );
        for (name, count) in &counts {
            let before = recorded[name];
            assert!(
                f64::from(*count) <= JUMP * f64::from(before),
                "{name}: {count} instructions were verified, and {before} are recorded in {RECORD}: \
                 write the new number there if it is meant"
            );
        }
    });
}

/// From 5.16 on the kernel says it of a loaded program: there, what is logged is what was loaded.
#[test]
fn what_is_logged_is_what_is_loaded() {
    alone(|| {
        if running().unwrap() < (5, 16) {
            println!(
                "SKIP what_is_logged_is_what_is_loaded: Linux tells what it verified from 5.16 on"
            );
            return;
        }
        let mut counts = Counts::new();
        for hook in [Hook::Tc, Hook::Xdp] {
            let kernel = load(hook);
            for (name, program) in kernel.ebpf().programs() {
                // The other hook's programs are not loaded.
                let Ok(info) = program.info() else { continue };
                let count = info.verified_instruction_count();
                counts.extend(count.map(|count| (name.to_owned(), count)));
            }
            kernel.unpin_all().unwrap();
        }
        assert_eq!(counts, logged());
    });
}

/// What the verifier writes into its log, if it is asked for one: on every kernel. A loader asks for
/// none if all is well, so this does what aya does, in short.
fn logged() -> Counts {
    unlimit_locked_memory().unwrap();
    let mut object = Object::parse(OBJECT).unwrap();
    // As the agent loads it unless it is asked to debug.
    let quiet = 0_u8.to_ne_bytes();
    let globals = [(aya_log::LEVEL, (&quiet[..], true))];
    object.patch_map_data(globals.into()).unwrap();
    let texts: HashSet<usize> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    let maps: Vec<_> = object
        .maps
        .drain()
        .map(|(name, map)| {
            let data = MapData::create(map.clone(), &name, None).unwrap();
            let fd = data.fd().as_fd().as_raw_fd();
            // What is constant is known to the verifier, and spares it ways.
            if !map.data().is_empty() {
                let key = 0_u32;
                let entry = attributes(
                    &[(0, fd.cast_unsigned())],
                    &[
                        (8, (&raw const key) as u64),
                        (16, map.data().as_ptr() as u64),
                    ],
                );
                // SAFETY: the map has this key's size, and its value's is that of the data.
                unsafe { call(MAP_UPDATE_ELEM, &entry) }.unwrap();
                if name.starts_with(".rodata") {
                    let map = attributes(&[(0, fd.cast_unsigned())], &[]);
                    // SAFETY: no pointers.
                    unsafe { call(MAP_FREEZE, &map) }.unwrap();
                }
            }
            (name, data, map)
        })
        .collect();
    let told = maps
        .iter()
        .map(|(name, data, map)| (name.as_str(), data.fd().as_fd().as_raw_fd(), map));
    object.relocate_maps(told, &texts).unwrap();
    object.relocate_calls(&texts).unwrap();
    let count = |(name, kind)| {
        let key = object.programs[name].function_key();
        let count = processed(kind, &object.functions[&key].instructions);
        (String::from(name), count)
    };
    PROGRAMS.map(count).into()
}

fn processed(kind: u32, code: &[bpf_insn]) -> u32 {
    /// `BPF_LOG_STATS`
    const STATS: u32 = 4;
    let license = c"Dual MIT/GPL";
    let mut log = vec![0_u8; 1 << 16];
    let program = attributes(
        &[
            (0, kind),
            (4, code.len().try_into().unwrap()),
            (24, STATS),
            (28, log.len().try_into().unwrap()),
        ],
        &[
            (8, code.as_ptr() as u64),
            (16, license.as_ptr() as u64),
            (32, log.as_mut_ptr() as u64),
        ],
    );
    // SAFETY: the code and the log are as long as it says, and the license has its end; all live.
    let loaded = unsafe { open(PROG_LOAD, &program) };
    let log = String::from_utf8_lossy(&log).into_owned();
    let log = log.trim_end_matches('\0');
    loaded.unwrap_or_else(|error| panic!("{error:#}: {log}"));
    let count = log.lines().find_map(|line| {
        line.strip_prefix("processed ")?
            .split(' ')
            .next()?
            .parse()
            .ok()
    });
    count.unwrap_or_else(|| panic!("no count in {log:?}"))
}
