//! Products of bf16 with AMX tiles: 16 rows by 16 lanes at a time, 32 inputs an instruction.

use std::arch::asm;
use std::arch::x86_64 as intel;
use std::sync::OnceLock;

use super::PAIR;
use crate::cpu::product::{Bf16Product, Out, Panels};

/// Rows of a tile.
const ROWS: usize = 16;

/// Pairs of inputs of a tile.
pub(crate) const PAIRS: usize = 16;

/// The CPU has tiles and products of bf16 in them, and the kernel lets this process use them. Asked for once: threads that
/// start later inherit it, threads that run already have it too.
pub(super) fn is_here() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| cfg!(target_os = "linux") && has_tiles() && permitted())
}

fn has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    intel::__cpuid(0).eax >= 7 && intel::__cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE
}

/// Asks Linux, which it has to be, for the state of tiles, which is too large to be given to every process. Source: the kernel's documentation of
/// dynamically enabled XSTATE features.
fn permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let answer: isize;
    // SAFETY: a system call that takes two numbers and writes no memory; it may change the registers named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

pub(super) fn panels_at_once(rows: usize) -> usize {
    if rows > ROWS { 2 } else { 4 }
}

/// Sums of up to 32 rows and two panels, or of up to 16 rows and four panels, at once: enough chains to hide the latency of
/// each. A sum takes 32 inputs at a time, in order, whatever stands beside it.
pub(super) fn multiply(product: Bf16Product<'_>) {
    let Bf16Product { rows, row_stride, count, panels, mut out, add } = product;
    assert!(panels.pairs.is_multiple_of(PAIRS), "tiles take {PAIRS} pairs at a time, not {}", panels.pairs);
    let mut shape = (0, 0);
    let panels_at_once = panels_at_once(count);
    let at_once = if panels_at_once == 2 { 2 * ROWS } else { ROWS };
    for panel in (0..panels.count).step_by(panels_at_once) {
        let columns = panels_at_once.min(panels.count - panel);
        for row in (0..count).step_by(at_once) {
            let rows_here = at_once.min(count - row);
            let (first, second) = (rows_here.min(ROWS), rows_here.saturating_sub(ROWS));
            if shape != (first, second) {
                shape = (first, second);
                // SAFETY: `is_here` has seen to it that this process may use tiles.
                unsafe { configure(first, second, panels_at_once) };
            }
            let place = Place {
                rows: &rows[row * row_stride..],
                row_stride,
                panels: &panels,
                panel,
                row,
                rows_here,
                add,
            };
            match (panels_at_once, columns) {
                (2, 1) => place.tall::<1>(&mut out),
                (2, _) => place.tall::<2>(&mut out),
                (_, 1) => place.flat::<1>(&mut out),
                (_, 2) => place.flat::<2>(&mut out),
                (_, 3) => place.flat::<3>(&mut out),
                _ => place.flat::<4>(&mut out),
            }
        }
    }
    // SAFETY: as above. What is left in the tiles would be saved at every switch of threads.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
}

/// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights. With two panels at once sums 2 and 3 are those of the second rows.
///
/// # Safety
/// The process may use tiles.
unsafe fn configure(first: usize, second: usize, panels_at_once: usize) {
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    let (first, second) = (first as u8, second.max(1) as u8);
    let sums = if panels_at_once == 2 { [first, first, second, second] } else { [first; 4] };
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    config.row_bytes[..8].fill(64);
    config.rows[..4].copy_from_slice(&sums);
    config.rows[4..8].copy_from_slice(&[first, second, PAIRS as u8, PAIRS as u8]);
    // SAFETY: the configuration is 64 readable bytes, and one that palette 1 has: 8 tiles of up to 16 rows of 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags)) };
}

macro_rules! tile {
    ($instruction:literal, $tile:literal, $pointer:expr, $stride:expr) => {
        asm!(
            concat!($instruction, " tmm", $tile, ", [{pointer} + {stride}*1]"),
            pointer = in(reg) $pointer,
            stride = in(reg) $stride,
            options(nostack, preserves_flags),
        )
    };
}

macro_rules! load {
    ($tile:literal, $pointer:expr, $stride:expr) => {
        tile!("tileloadd", $tile, $pointer, $stride)
    };
}

macro_rules! store {
    ($tile:literal, $pointer:expr, $stride:expr) => {
        asm!(
            concat!("tilestored [{pointer} + {stride}*1], tmm", $tile),
            pointer = in(reg) $pointer,
            stride = in(reg) $stride,
            options(nostack, preserves_flags),
        )
    };
}

macro_rules! zero {
    ($tile:literal) => {
        asm!(concat!("tilezero tmm", $tile), options(nostack, preserves_flags))
    };
}

macro_rules! add {
    ($sum:literal, $rows:literal, $weights:literal) => {
        asm!(
            concat!("tdpbf16ps tmm", $sum, ", tmm", $rows, ", tmm", $weights),
            options(nostack, preserves_flags),
        )
    };
}

/// The rows and panels of one set of sums.
struct Place<'a> {
    /// From its first row on.
    rows: &'a [u16],
    row_stride: usize,
    panels: &'a Panels<'a, u16>,
    panel: usize,
    row: usize,
    rows_here: usize,
    add: bool,
}

impl Place<'_> {
    /// Where its rows begin, the bytes between two of them, and where its panels do. Looks at the ends of all, so that tiles
    /// stay within.
    fn sources<const PANELS: usize>(&self) -> (*const u16, usize, [*const [u16; PAIR]; PANELS], usize) {
        let last = (self.rows_here - 1) * self.row_stride + 2 * self.panels.pairs;
        let rows = &self.rows[..last];
        let panels = std::array::from_fn(|at| self.panels.of(self.panel + at).as_ptr());
        (rows.as_ptr(), 2 * self.row_stride, panels, size_of::<[u16; PAIR]>() * self.panels.pair_stride)
    }

    /// Up to 16 rows.
    fn flat<const PANELS: usize>(&self, out: &mut Out<'_>) {
        let (rows, row_bytes, panels, pair_bytes) = self.sources::<PANELS>();
        let starts: [usize; PANELS] =
            std::array::from_fn(|at| out.start(self.row, self.rows_here, self.panel + at));
        let sums = out.values.as_mut_ptr();
        let sum_bytes = size_of::<f32>() * out.row_stride;
        // SAFETY: the process may use tiles, and they are configured. `sources` and `start` have looked that all rows a tile
        // has, 64 bytes each, lie within what the pointers come from.
        unsafe {
            let sums = starts.map(|start| sums.add(start));
            macro_rules! sums {
                ($what:ident) => {
                    $what!("0", sums[0], sum_bytes);
                    if PANELS > 1 {
                        $what!("1", sums[1], sum_bytes);
                    }
                    if PANELS > 2 {
                        $what!("2", sums[2], sum_bytes);
                    }
                    if PANELS > 3 {
                        $what!("3", sums[3], sum_bytes);
                    }
                };
            }
            if self.add {
                sums!(load);
            } else {
                zero!("0");
                zero!("1");
                zero!("2");
                zero!("3");
            }
            for tile in 0..self.panels.pairs / PAIRS {
                let below = tile * PAIRS * pair_bytes;
                load!("4", rows.byte_add(tile * 4 * PAIRS), row_bytes);
                load!("6", panels[0].byte_add(below), pair_bytes);
                add!("0", "4", "6");
                if PANELS > 1 {
                    load!("7", panels[1].byte_add(below), pair_bytes);
                    add!("1", "4", "7");
                }
                if PANELS > 2 {
                    load!("6", panels[2].byte_add(below), pair_bytes);
                    add!("2", "4", "6");
                }
                if PANELS > 3 {
                    load!("7", panels[3].byte_add(below), pair_bytes);
                    add!("3", "4", "7");
                }
            }
            sums!(store);
        }
    }

    /// Up to 32 rows.
    fn tall<const PANELS: usize>(&self, out: &mut Out<'_>) {
        let (rows, row_bytes, panels, pair_bytes) = self.sources::<PANELS>();
        let below = self.rows_here.saturating_sub(ROWS);
        let two = below > 0;
        let first: [usize; PANELS] =
            std::array::from_fn(|at| out.start(self.row, self.rows_here - below, self.panel + at));
        let second: [usize; PANELS] = std::array::from_fn(|at| match below {
            0 => first[at],
            _ => out.start(self.row + ROWS, below, self.panel + at),
        });
        let sums = out.values.as_mut_ptr();
        let sum_bytes = size_of::<f32>() * out.row_stride;
        // SAFETY: as in `flat`; tiles of the second rows are read and written only where there are some.
        unsafe {
            let (first, second) = (first.map(|start| sums.add(start)), second.map(|start| sums.add(start)));
            macro_rules! sums {
                ($what:ident) => {
                    $what!("0", first[0], sum_bytes);
                    if PANELS > 1 {
                        $what!("1", first[1], sum_bytes);
                    }
                    if two {
                        $what!("2", second[0], sum_bytes);
                        if PANELS > 1 {
                            $what!("3", second[1], sum_bytes);
                        }
                    }
                };
            }
            if self.add {
                sums!(load);
            } else {
                zero!("0");
                zero!("1");
                zero!("2");
                zero!("3");
            }
            let second_rows = if two { rows.byte_add(ROWS * row_bytes) } else { rows };
            for tile in 0..self.panels.pairs / PAIRS {
                let down = tile * PAIRS * pair_bytes;
                load!("4", rows.byte_add(tile * 4 * PAIRS), row_bytes);
                load!("6", panels[0].byte_add(down), pair_bytes);
                add!("0", "4", "6");
                if PANELS > 1 {
                    load!("7", panels[1].byte_add(down), pair_bytes);
                    add!("1", "4", "7");
                }
                if two {
                    load!("5", second_rows.byte_add(tile * 4 * PAIRS), row_bytes);
                    add!("2", "5", "6");
                    if PANELS > 1 {
                        add!("3", "5", "7");
                    }
                }
            }
            sums!(store);
        }
    }
}
