#![no_main]

use herd_fuzz::TARGETS;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| (TARGETS[3].run)(bytes));
