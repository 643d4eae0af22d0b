//! What is said on a KV connection besides frames: the sender's hello, and the receiver's replies. Pure.
//!
//! A hello is 192 bytes: `HKVH`, version (2), source rank (2), target rank (2), length of the fingerprint (2), epoch (8),
//! transfer (8), fingerprint padded with zeros (160), CRC-32 (4) of what stands before it.
//! A reply is 20 bytes: `HKVA`, status (2), 0 (2), frames accepted on this connection so far (8), CRC-32 (4). The first
//! reply answers the hello; then comes one after each frame. Any status but 0 is the last thing said.

use super::PROTOCOL_VERSION;
use super::frame::{FrameError, u16_at, u32_at, u64_at};

/// Bytes of a [`Hello`].
pub const HELLO_BYTES: usize = 192;
/// Bytes of a [`Reply`].
pub const REPLY_BYTES: usize = 20;

const HELLO_MAGIC: [u8; 4] = *b"HKVH";
const REPLY_MAGIC: [u8; 4] = *b"HKVA";
const FINGERPRINT_AT: usize = 28;
const HELLO_CRC_AT: usize = HELLO_BYTES - 4;

/// The longest fingerprint a hello has room for, bytes.
pub const MAX_FINGERPRINT_BYTES: usize = HELLO_CRC_AT - FINGERPRINT_AT;

/// Who sends what to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Tensor rank of the sender.
    pub source_rank: u16,
    /// Tensor rank this connection is meant for.
    pub target_rank: u16,
    /// Of the receiving gang.
    pub epoch: u64,
    /// Named by the receiving gang.
    pub transfer: u64,
    /// At most [`MAX_FINGERPRINT_BYTES`].
    pub fingerprint: String,
}

/// Why a receiver ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reject {
    /// Bytes were damaged on the way.
    Checksum,
    /// A header that makes no sense.
    Header,
    /// Another protocol.
    Version,
    /// Another model, dtype, block size or numerics.
    Fingerprint,
    /// The gang that was meant has ended.
    Epoch,
    /// A transfer that is not open (any more).
    Transfer,
    /// Meant for another rank.
    Rank,
    /// Layers, heads, block or rows outside of what was reserved.
    Bounds,
    /// The transfer was given up while it went on. Nobody is at fault.
    Over,
}

impl Reject {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Checksum,
        Self::Header,
        Self::Version,
        Self::Fingerprint,
        Self::Epoch,
        Self::Transfer,
        Self::Rank,
        Self::Bounds,
        Self::Over,
    ];

    /// The metric label.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Checksum => "checksum",
            Self::Header => "header",
            Self::Version => "version",
            Self::Fingerprint => "fingerprint",
            Self::Epoch => "epoch",
            Self::Transfer => "transfer",
            Self::Rank => "rank",
            Self::Bounds => "bounds",
            Self::Over => "over",
        }
    }

    /// Whether the same bytes could be taken when sent again.
    pub const fn is_damage(self) -> bool {
        matches!(self, Self::Checksum | Self::Header)
    }

    const fn code(self) -> u16 {
        match self {
            Self::Checksum => 1,
            Self::Header => 2,
            Self::Version => 3,
            Self::Fingerprint => 4,
            Self::Epoch => 5,
            Self::Transfer => 6,
            Self::Rank => 7,
            Self::Bounds => 8,
            Self::Over => 9,
        }
    }
}

impl From<FrameError> for Reject {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Header(_) => Self::Header,
            FrameError::Version(_) => Self::Version,
            FrameError::Checksum => Self::Checksum,
        }
    }
}

/// The receiver's answer to a hello or a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Frames taken on this connection so far.
    Accepted(u64),
    /// The connection is over.
    Rejected(Reject),
}

impl Hello {
    /// As it goes on the wire; `None` where the fingerprint is too long.
    pub fn encode(&self) -> Option<[u8; HELLO_BYTES]> {
        let Self { source_rank, target_rank, epoch, transfer, fingerprint } = self;
        if fingerprint.len() > MAX_FINGERPRINT_BYTES {
            return None;
        }
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..4].copy_from_slice(&HELLO_MAGIC);
        bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&source_rank.to_le_bytes());
        bytes[8..10].copy_from_slice(&target_rank.to_le_bytes());
        bytes[10..12].copy_from_slice(&(fingerprint.len() as u16).to_le_bytes());
        bytes[12..20].copy_from_slice(&epoch.to_le_bytes());
        bytes[20..28].copy_from_slice(&transfer.to_le_bytes());
        bytes[FINGERPRINT_AT..FINGERPRINT_AT + fingerprint.len()].copy_from_slice(fingerprint.as_bytes());
        seal(&mut bytes);
        Some(bytes)
    }

    /// Reads a hello. The version goes first: what follows it may look different in another one.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, Reject> {
        if bytes[0..4] != HELLO_MAGIC {
            return Err(Reject::Header);
        }
        if !sealed(bytes) {
            return Err(if u16_at(bytes, 4) == PROTOCOL_VERSION {
                Reject::Checksum
            } else {
                Reject::Version
            });
        }
        if u16_at(bytes, 4) != PROTOCOL_VERSION {
            return Err(Reject::Version);
        }
        let fingerprint = bytes[FINGERPRINT_AT..HELLO_CRC_AT]
            .get(..usize::from(u16_at(bytes, 10)))
            .and_then(|fingerprint| std::str::from_utf8(fingerprint).ok())
            .ok_or(Reject::Header)?;
        Ok(Self {
            source_rank: u16_at(bytes, 6),
            target_rank: u16_at(bytes, 8),
            epoch: u64_at(bytes, 12),
            transfer: u64_at(bytes, 20),
            fingerprint: fingerprint.to_owned(),
        })
    }
}

impl Reply {
    /// As it goes on the wire.
    pub fn encode(self) -> [u8; REPLY_BYTES] {
        let (status, accepted) = match self {
            Self::Accepted(accepted) => (0, accepted),
            Self::Rejected(reject) => (reject.code(), 0),
        };
        let mut bytes = [0; REPLY_BYTES];
        bytes[0..4].copy_from_slice(&REPLY_MAGIC);
        bytes[4..6].copy_from_slice(&status.to_le_bytes());
        bytes[8..16].copy_from_slice(&accepted.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    /// Reads a reply; `None` where it was damaged.
    pub fn decode(bytes: &[u8; REPLY_BYTES]) -> Option<Self> {
        if bytes[0..4] != REPLY_MAGIC || bytes[6..8] != [0, 0] || !sealed(bytes) {
            return None;
        }
        match u16_at(bytes, 4) {
            0 => Some(Self::Accepted(u64_at(bytes, 8))),
            code => Reject::ALL.into_iter().find(|reject| reject.code() == code).map(Self::Rejected),
        }
    }
}

/// Puts the checksum of all bytes before it into the last four.
fn seal(bytes: &mut [u8]) {
    let at = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..at]);
    bytes[at..].copy_from_slice(&crc.to_le_bytes());
}

fn sealed(bytes: &[u8]) -> bool {
    let at = bytes.len() - 4;
    crc32fast::hash(&bytes[..at]) == u32_at(bytes, at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Hello {
        Hello {
            source_rank: 1,
            target_rank: 2,
            epoch: 3,
            transfer: 4,
            fingerprint: "kv1:0123456789abcdef0123456789abcdef".to_owned(),
        }
    }

    #[test]
    fn every_bit_of_a_hello_counts() {
        let bytes = hello().encode().unwrap();
        assert_eq!(Hello::decode(&bytes), Ok(hello()));
        for bit in 0..HELLO_BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Hello::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_fingerprint_has_bounds() {
        let at_most = Hello { fingerprint: "x".repeat(MAX_FINGERPRINT_BYTES), ..hello() };
        assert_eq!(Hello::decode(&at_most.encode().unwrap()), Ok(at_most));
        assert_eq!(Hello { fingerprint: "x".repeat(MAX_FINGERPRINT_BYTES + 1), ..hello() }.encode(), None);
    }

    #[test]
    fn every_bit_of_a_reply_counts() {
        let replies = Reject::ALL.into_iter().map(Reply::Rejected).chain([Reply::Accepted(1 << 40)]);
        for reply in replies {
            let bytes = reply.encode();
            assert_eq!(Reply::decode(&bytes), Some(reply));
            for bit in 0..REPLY_BYTES * 8 {
                let mut damaged = bytes;
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Reply::decode(&damaged), None, "bit {bit}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), HELLO_BYTES)) {
            prop_assert!(Hello::decode(bytes.first_chunk().unwrap()).is_err());
            prop_assert_eq!(Reply::decode(bytes.first_chunk().unwrap()), None);
        }
    }
}
