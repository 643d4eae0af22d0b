//! What the machine itself can do: the bounds that figures stand beside.

use std::io::Read as _;
use std::time::{Duration, Instant};

use herd_engine::Isa;
use memmap2::{Advice, MmapMut};

/// Of each measurement the best of so many counts: a bound is what the machine can do, not what it does on the average.
const TRIES: usize = 5;

/// Larger than every cache.
const BYTES: usize = 1 << 30;

pub(super) struct Machine {
    /// Bytes a second that all threads read of memory.
    pub(super) memory: f64,
    /// Bytes a second that all threads read of a file that is in the page cache.
    pub(super) page_cache: f64,
    /// Of the engine's own products on numbers in the nearest cache.
    pub(super) multiply_adds: f64,
}

pub(super) fn measure(isa: Isa, threads: usize) -> std::io::Result<Machine> {
    // In large pages where the system has them: with small ones it would be their translation that is measured.
    let mut memory = MmapMut::map_anon(BYTES)?;
    memory.advise(Advice::HugePage)?;
    memory.fill(1);
    let words = memory.as_chunks().0;
    let parts: Vec<&[[u8; 8]]> = words.chunks(words.len().div_ceil(threads)).collect();
    let read = best(|| {
        std::thread::scope(|scope| {
            for part in &parts {
                scope.spawn(|| {
                    std::hint::black_box(
                        part.iter().fold(0, |sum: u64, word| sum.wrapping_add(u64::from_le_bytes(*word))),
                    )
                });
            }
        });
    });
    Ok(Machine {
        memory: BYTES as f64 / read,
        page_cache: page_cache(threads).unwrap_or(f64::NAN),
        multiply_adds: herd_engine::peak_multiply_adds(isa, threads, Duration::from_millis(300)),
    })
}

fn best(mut work: impl FnMut()) -> f64 {
    let times = (0..TRIES).map(|_| {
        let started = Instant::now();
        work();
        started.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

/// Each thread reads a file of its own, a mebibyte at a time.
fn page_cache(threads: usize) -> std::io::Result<f64> {
    const FILE: usize = 256 << 20;
    let folder = tempfile::tempdir()?;
    let files: Vec<_> = (0..threads).map(|thread| folder.path().join(thread.to_string())).collect();
    for file in &files {
        std::fs::write(file, vec![1; FILE])?;
    }
    let time = best(|| {
        std::thread::scope(|scope| {
            for file in &files {
                scope.spawn(move || {
                    let mut buffer = vec![0; 1 << 20];
                    if let Ok(mut file) = std::fs::File::open(file) {
                        while file.read(&mut buffer).is_ok_and(|bytes| bytes > 0) {}
                    }
                });
            }
        });
    });
    Ok((FILE * threads) as f64 / time)
}
