//! KV from the ranks of a prefill gang to the ranks of a decode gang.
//!
//! One connection a transfer and route (source rank, target rank, heads), opened by the sender with a [`Hello`]. Frames are
//! numbered in an order both the progress of the prompt and a resumption follow from: block by block, layer by layer. The
//! receiver replies to each; the sender has at most `WINDOW` frames without a reply. Any damage, at either end, ends the
//! connection: the sender opens another and goes on after the last frame that was acknowledged. A frame that comes twice is
//! written twice, to the same bytes.

mod coverage;
mod frame;
mod handshake;
mod landing;
mod loopback;
mod receiver;
mod sender;

use std::time::Duration;

pub use frame::{ClaimedHeader, FrameError, FrameHeader, HEADER_BYTES};
pub(crate) use frame::{u16_at, u32_at, u64_at};
pub use handshake::{HELLO_BYTES, Hello, MAX_FINGERPRINT_BYTES, REPLY_BYTES, Reject, Reply};
pub(crate) use landing::Landing;
pub use loopback::Loopback;
pub(crate) use receiver::{Receiver, Store, receive};
pub(crate) use sender::{Outgoing, Progress, Route, send};

/// Of frames, hellos and replies together.
pub const PROTOCOL_VERSION: u16 = 1;

/// Frames that are sent and not acknowledged: some megabytes in flight, enough for a 10 Gbit/s link at 1 ms.
const WINDOW: u64 = 32;

/// For the other side to answer a hello. It only looks up the transfer.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// For one frame to pass, from its first byte to its last, and for the reply to the oldest one. A frame is some hundred
/// kilobytes and is copied into place at once; a peer this slow is as good as gone.
const FRAME_DEADLINE: Duration = Duration::from_secs(10);

/// Connections a route opens at most. A damaged frame costs one; a network that eats this many is down.
const MAX_CONNECTIONS: u32 = 6;

/// Before the second connection; doubles from one to the next, to 0.8 s before the last. Together well below a lease.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
