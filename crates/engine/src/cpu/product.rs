//! Products of rows with panels of weights, the one kernel of linears and of attention.
//!
//! The columns of the right factor are grouped into panels of [`LANES`] lanes; a panel holds, for each pair of inputs in
//! turn, both numbers of every lane. Each sum is one chain of additions over the inputs in order, by the same instructions
//! whatever the number of rows and panels: one row or many give the same bits.

use super::isa::{Arithmetic, Kernel, LANES, PAIR};
use super::stored::Stored;

/// The right factor: of linears weights, of attention keys or values of a block.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a, W> {
    /// Pairs of inputs, each [`PAIR`] numbers.
    pub(crate) values: &'a [[W; PAIR]],
    /// From a pair to the next one of the panel.
    pub(crate) pair_stride: usize,
    /// From a panel to the next.
    pub(crate) panel_stride: usize,
    /// How many panels.
    pub(crate) count: usize,
    /// Pairs of each.
    pub(crate) pairs: usize,
}

impl<'a, W> Panels<'a, W> {
    /// A panel from its first pair on; it reaches to the last one.
    #[inline(always)]
    pub(crate) fn of(&self, panel: usize) -> &'a [[W; PAIR]] {
        let last = (self.pairs.max(1) - 1) * self.pair_stride;
        &self.values[panel * self.panel_stride..][..=last]
    }
}

/// Where sums go: one vector for each row and panel.
pub(crate) struct Out<'a> {
    pub(crate) values: &'a mut [f32],
    /// Numbers from a row to the next.
    pub(crate) row_stride: usize,
    /// Numbers from a panel to the next.
    pub(crate) panel_stride: usize,
}

impl Out<'_> {
    /// Where the vectors of some rows of a panel begin, all of which are there.
    ///
    /// # Panics
    /// When they are not.
    #[inline(always)]
    pub(crate) fn start(&self, row: usize, rows: usize, panel: usize) -> usize {
        let start = row * self.row_stride + panel * self.panel_stride;
        assert!(start + (rows - 1) * self.row_stride + LANES <= self.values.len(), "sums without a place");
        start
    }

    /// The vector of a row and panel.
    #[inline(always)]
    pub(crate) fn lanes(&mut self, row: usize, panel: usize) -> &mut [f32; LANES] {
        let start = self.start(row, 1, panel);
        // As long as `start` has looked for.
        match self.values[start..].first_chunk_mut() {
            Some(lanes) => lanes,
            None => unreachable!(),
        }
    }
}

/// A product of rows of f32.
pub(crate) struct PairProduct<'a, W> {
    /// Row-major, two numbers for each pair.
    pub(crate) rows: &'a [f32],
    /// Numbers from a row to the next.
    pub(crate) row_stride: usize,
    /// How many rows.
    pub(crate) count: usize,
    pub(crate) panels: Panels<'a, W>,
    pub(crate) out: Out<'a>,
    /// To what `out` holds; else it is overwritten.
    pub(crate) add: bool,
}

/// A product of rows of bits of bf16; see [`PairProduct`].
pub(crate) struct Bf16Product<'a> {
    pub(crate) rows: &'a [u16],
    pub(crate) row_stride: usize,
    pub(crate) count: usize,
    pub(crate) panels: Panels<'a, u16>,
    pub(crate) out: Out<'a>,
    pub(crate) add: bool,
}

/// Sums of a few rows and panels, which are kept in registers.
pub(crate) trait Tiles {
    /// Computes those from this row and panel on.
    fn tile<const ROWS: usize, const PANELS: usize>(&mut self, row: usize, panel: usize);

    /// Cuts a product into tiles. Wide: 24 sums, 4 vectors of weights and an input fill 32 registers. Else 12 sums of half a
    /// vector, 2 of weights and an input fill 16; one row takes 4 panels, to hide the latency of its additions.
    #[inline(always)]
    fn run(&mut self, rows: usize, panels: usize, wide: bool) {
        let mut panel = 0;
        while panel < panels {
            if panels - panel >= 4 && (wide || rows == 1) {
                self.panels::<4>(rows, panel, wide);
                panel += 4;
            } else {
                self.panels::<1>(rows, panel, true);
                panel += 1;
            }
        }
    }

    /// All rows of some panels.
    #[inline(always)]
    fn panels<const PANELS: usize>(&mut self, rows: usize, panel: usize, many_rows: bool) {
        if !many_rows {
            for row in 0..rows {
                self.tile::<1, PANELS>(row, panel);
            }
            return;
        }
        let whole = rows - rows % 6;
        for row in (0..whole).step_by(6) {
            self.tile::<6, PANELS>(row, panel);
        }
        match rows - whole {
            1 => self.tile::<1, PANELS>(whole, panel),
            2 => self.tile::<2, PANELS>(whole, panel),
            3 => self.tile::<3, PANELS>(whole, panel),
            4 => self.tile::<4, PANELS>(whole, panel),
            5 => self.tile::<5, PANELS>(whole, panel),
            _ => {}
        }
    }
}

impl<W: Stored> Kernel for PairProduct<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let (count, panels) = (self.count, self.panels.count);
        PairTiles::<A, W> { product: self, arithmetic: std::marker::PhantomData }.run(count, panels, A::WIDE);
    }
}

struct PairTiles<'a, A, W> {
    product: PairProduct<'a, W>,
    arithmetic: std::marker::PhantomData<A>,
}

impl<A: Arithmetic, W: Stored> Tiles for PairTiles<'_, A, W> {
    #[inline(always)]
    fn tile<const ROWS: usize, const PANELS: usize>(&mut self, row: usize, panel: usize) {
        let PairProduct { rows, row_stride, count: _, panels, out, add } = &mut self.product;
        let x: [&[[f32; 2]]; ROWS] =
            std::array::from_fn(|at| &rows[(row + at) * *row_stride..].as_chunks().0[..panels.pairs]);
        let weights: [&[[W; PAIR]]; PANELS] = std::array::from_fn(|at| panels.of(panel + at));
        let mut sums = [[A::splat(0.0); PANELS]; ROWS];
        if *add {
            for (at_row, sums) in sums.iter_mut().enumerate() {
                for (at_panel, sum) in sums.iter_mut().enumerate() {
                    *sum = A::load(out.lanes(row + at_row, panel + at_panel));
                }
            }
        }
        // Loops: what a closure does would not be compiled for the instruction set.
        let mut loaded = [[A::splat(0.0); 2]; PANELS];
        for pair in 0..panels.pairs {
            for at_panel in 0..PANELS {
                loaded[at_panel] = W::load::<A>(&weights[at_panel][pair * panels.pair_stride]);
            }
            for at_row in 0..ROWS {
                let [first, second] = x[at_row][pair];
                let (first, second) = (A::splat(first), A::splat(second));
                for at_panel in 0..PANELS {
                    let sum = A::mul_add_lanes(first, loaded[at_panel][0], sums[at_row][at_panel]);
                    sums[at_row][at_panel] = A::mul_add_lanes(second, loaded[at_panel][1], sum);
                }
            }
        }
        for (at_row, sums) in sums.iter().enumerate() {
            for (at_panel, sum) in sums.iter().enumerate() {
                A::store(*sum, out.lanes(row + at_row, panel + at_panel));
            }
        }
    }
}
