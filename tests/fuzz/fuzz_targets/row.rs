#![no_main]

#[expect(dead_code, reason = "all targets are in one file")]
#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::row(bytes));
