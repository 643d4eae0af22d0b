//! A fixed number of mutated seeds for each target: none of them panics, and none allocates more than its bytes warrant.
//! The same cases each time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};

use herd_fuzz::{TARGETS, Target};

const CASES: usize = 2_000;

/// Counts what is allocated now and was at most.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[expect(unsafe_code, reason = "an allocator is unsafe to be one; it hands on to the system's")]
// SAFETY: every call goes to `System` with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 16) as usize % end.max(1)
    }
}

/// Numbers at the edges of what readers count in.
const EDGES: [u64; 10] =
    [0, 1, 0x7f, 0xff, 0xffff, 0xffff_ffff, 1 << 40, u64::MAX >> 1, u64::MAX - 7, u64::MAX];
const WORDS: [&str; 14] = [
    "null",
    "true",
    "-1",
    "1e999",
    "0.5",
    "18446744073709551615",
    "4294967296",
    "\"\"",
    "[]",
    "{}",
    "[[[[",
    "\\u0000",
    "\u{1f408}",
    "re:(a{500}){500}",
];

/// One to four changes.
fn mutate(seed: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        let rest = bytes.len() - at;
        match random.below(9) {
            0 if rest > 0 => bytes[at] ^= 1 << random.below(8),
            1 if rest > 0 => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + random.below(rest.min(40)))),
            4 => {
                let part = bytes[at..at + random.below(rest.min(200))].to_vec();
                drop(bytes.splice(at..at, part));
            }
            5 => {
                let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)].min(rest);
                bytes[at..at + width].copy_from_slice(&edge[..width]);
            }
            6 => {
                let word = WORDS[random.below(WORDS.len())].bytes();
                drop(bytes.splice(at..at, word));
            }
            7 => replace_number(&mut bytes, at, random),
            _ => {
                let from = random.below(other.len());
                let part = other[from..from + random.below((other.len() - from).min(200))].to_vec();
                let end = at + random.below(rest.min(200));
                drop(bytes.splice(at..end, part));
            }
        }
    }
    bytes
}

/// The next decimal number becomes another one.
fn replace_number(bytes: &mut Vec<u8>, from: usize, random: &mut Random) {
    let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit).map(|at| from + at) else { return };
    let length = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = EDGES[random.below(EDGES.len())].to_string();
    drop(bytes.splice(start..start + length, number.into_bytes()));
}

/// One test, so that nothing else allocates.
#[test]
fn mutated_files_are_read_or_refused() {
    for Target { name, run, seeds, repair, reads, fixed_bytes, bytes_per_byte } in TARGETS {
        let seeds = seeds();
        assert!(reads(&seeds[0]), "{name}: the first seed is not read");
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (mut read, mut worst) = (0, 0.0_f64);
        for case in 0..CASES {
            let bytes = if case < seeds.len() {
                seeds[case].clone()
            } else {
                let (seed, other) = (random.below(seeds.len()), random.below(seeds.len()));
                let mut bytes = mutate(&seeds[seed], &seeds[other], &mut random);
                if random.below(2) == 0 {
                    repair(&mut bytes);
                }
                bytes
            };
            let before = NOW.load(Ordering::Relaxed);
            MOST.store(before, Ordering::Relaxed);
            let outcome = panic::catch_unwind(|| run(&bytes));
            let taken = MOST.load(Ordering::Relaxed) - before;
            let allowed = fixed_bytes + bytes_per_byte * bytes.len();
            let shown = || String::from_utf8_lossy(&bytes[..bytes.len().min(2000)]).into_owned();
            assert!(outcome.is_ok(), "{name}: case {case} panics: {:?}", shown());
            assert!(taken <= allowed, "{name}: case {case} takes {taken} of {allowed} bytes: {:?}", shown());
            worst = worst.max(taken as f64 / allowed as f64);
            read += usize::from(reads(&bytes));
        }
        println!("{name}: {read} of {CASES} cases are valid; at most {worst:.3} of the memory allowed");
        // Mutations that a reader never gets past the first byte of would prove little.
        assert!((10..CASES).contains(&read), "{name}: {read} of {CASES} cases are valid");
    }
}
