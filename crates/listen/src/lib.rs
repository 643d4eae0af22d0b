//! Listeners with bounds: how many connections there are, and how long one may be silent. Whoever connects is a stranger: what
//! is not bounded here holds a descriptor of the process for ever.

mod bounded;
mod pages;

pub use bounded::{Bounded, Connection, PeerWatch};
pub use pages::{PageLimits, serve_pages};
