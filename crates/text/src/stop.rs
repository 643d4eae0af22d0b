//! Stop strings in text that arrives in pieces.

use crate::TextError;

/// Stop strings of a request, at most.
pub const MAX_STOPS: usize = 16;
/// Bytes of one stop string, at most: this much text can be held back.
pub const MAX_STOP_BYTES: usize = 1024;

/// The stop strings of a choice, and what they do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    /// Each ends the text.
    pub strings: Vec<String>,
    /// Whether the one that ended it is part of the output.
    pub included: bool,
    /// Of the first so many tokens none completes a stop string that counts.
    pub min_tokens: usize,
}

impl From<Vec<String>> for Stops {
    fn from(strings: Vec<String>) -> Self {
        Self { strings, ..Self::default() }
    }
}

/// Finds the stop string that is complete first; of several that end at one place, the longest. So the answer does not
/// depend on how the text is cut.
pub(crate) struct StopMatcher {
    stops: Vec<Progress>,
    included: bool,
    /// Text that may still become a stop string, then text not yet looked at.
    held: String,
}

/// What [`StopMatcher`] lets go of.
pub(crate) struct Passed {
    pub(crate) text: String,
    pub(crate) stopped: bool,
}

/// One stop string, matched by Knuth, Morris and Pratt's automaton (SIAM J. Comput. 6(2), 1977): amortized constant work a
/// byte, also on hostile text.
struct Progress {
    stop: Vec<u8>,
    /// `border[n]`: the length of the longest proper prefix of `stop[..n]` that is also its suffix; `border[0]` is unused.
    border: Vec<usize>,
    /// Length of the longest prefix of `stop` that ends the text so far.
    matched: usize,
}

impl StopMatcher {
    pub(crate) fn new(stops: Vec<String>, included: bool) -> Result<Self, TextError> {
        if stops.len() > MAX_STOPS {
            return Err(TextError::BadStop(format!(
                "stop has {} strings; at most {MAX_STOPS} are allowed",
                stops.len()
            )));
        }
        for (index, stop) in stops.iter().enumerate() {
            if stop.is_empty() {
                return Err(TextError::BadStop(format!("stop[{index}] is empty; leave it out")));
            }
            if stop.len() > MAX_STOP_BYTES {
                return Err(TextError::BadStop(format!(
                    "stop[{index}] has {} bytes; at most {MAX_STOP_BYTES} are allowed",
                    stop.len()
                )));
            }
        }
        Ok(Self {
            stops: stops.into_iter().map(|stop| Progress::new(stop.into_bytes())).collect(),
            included,
            held: String::new(),
        })
    }

    /// Takes the next text and lets go of what cannot be part of a stop string any more. One that is complete within it ends
    /// the text if it `may_stop`. After `stopped` it must not be called again.
    pub(crate) fn push(&mut self, text: &str, may_stop: bool) -> Passed {
        let start = self.held.len();
        self.held.push_str(text);
        for (offset, &byte) in text.as_bytes().iter().enumerate() {
            let complete = self
                .stops
                .iter_mut()
                .filter_map(|progress| progress.step(byte).then_some(progress.stop.len()))
                .max();
            if let Some(length) = complete.filter(|_| may_stop) {
                let mut text = std::mem::take(&mut self.held);
                text.truncate(start + offset + 1 - if self.included { 0 } else { length });
                return Passed { text, stopped: true };
            }
        }
        let hold = self.stops.iter().map(|progress| progress.matched).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - hold);
        Passed { text: std::mem::replace(&mut self.held, tail), stopped: false }
    }

    /// No more text will come.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

impl Progress {
    fn new(stop: Vec<u8>) -> Self {
        let mut border = vec![0; stop.len() + 1];
        let mut length = 0;
        for n in 1..stop.len() {
            while length > 0 && stop[n] != stop[length] {
                length = border[length];
            }
            if stop[n] == stop[length] {
                length += 1;
            }
            border[n + 1] = length;
        }
        Self { stop, border, matched: 0 }
    }

    /// Whether the stop string is complete with this byte. It goes on to the next one, which may overlap.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.stop[self.matched] != byte {
            self.matched = self.border[self.matched];
        }
        if self.stop[self.matched] == byte {
            self.matched += 1;
        }
        let complete = self.matched == self.stop.len();
        if complete {
            self.matched = self.border[self.matched];
        }
        complete
    }
}
