//! How fast the products are when nothing keeps them waiting.

use std::thread;
use std::time::{Duration, Instant};

use super::isa::{Isa, LANES, PAIR};
use super::memory::Aligned;
use super::product::{Bf16Product, Out, PairProduct, Panels};

const ROWS: usize = 32;
const INPUTS: usize = 256;
const PANELS: usize = 2;

/// Multiply-adds a second of so many threads, each with rows and weights of bf16 in its nearest cache: the bound of every
/// linear. Takes `time`.
pub fn peak_multiply_adds(isa: Isa, threads: usize, time: Duration) -> f64 {
    let started = Instant::now();
    let total: u64 = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| multiply_until(isa, started + time))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
    });
    total as f64 / started.elapsed().as_secs_f64()
}

fn multiply_until(isa: Isa, deadline: Instant) -> u64 {
    const AT_ONCE: u64 = 256;
    let (bf16, wide) = (Aligned::<u16>::new(ROWS * INPUTS), Aligned::<f32>::new(ROWS * INPUTS));
    let weights = Aligned::<u16>::new(PANELS * INPUTS / 2 * PAIR);
    let mut sums = Aligned::<f32>::new(ROWS * PANELS * LANES);
    let mut done = 0;
    while Instant::now() < deadline {
        for _ in 0..AT_ONCE {
            let values = weights.as_chunks().0;
            let pairs = INPUTS / 2;
            let panels = Panels { values, pair_stride: 1, panel_stride: pairs, count: PANELS, pairs };
            let out = Out { values: &mut sums, row_stride: LANES, panel_stride: ROWS * LANES };
            let (row_stride, count, add) = (INPUTS, ROWS, false);
            if isa.has_bf16() {
                isa.multiply_bf16(Bf16Product { rows: &bf16, row_stride, count, panels, out, add });
            } else {
                isa.run(PairProduct { rows: &wide, row_stride, count, panels, out, add });
            }
        }
        done += AT_ONCE * (ROWS * INPUTS * PANELS * LANES) as u64;
    }
    done
}
