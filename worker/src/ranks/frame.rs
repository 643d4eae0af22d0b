//! What ranks of different processes give each other, on the wire. Pure.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 4 | `HRKF` |
//! | 4 | 2 | version |
//! | 6 | 1 | kind |
//! | 7 | 1 | 0 |
//! | 8 | 8 | epoch of the gang |
//! | 16 | 8 | frames before this one on this connection and way |
//! | 24 | 2 + 2 | first rank, ranks |
//! | 28 | 4 | values of each rank |
//! | 32 | 4 | CRC-32 of the payload |
//! | 36 | 4 | CRC-32 of bytes 0..36 |
//!
//! Numbers are little endian. The payload is `[ranks, values]` in f32.

use super::PROTOCOL_VERSION;
use crate::transfer::{u16_at, u32_at, u64_at};

const MAGIC: [u8; 4] = *b"HRKF";
const CRC_AT: usize = 36;
const VALUE_BYTES: usize = 4;

/// Bytes of a frame before its payload.
pub(super) const HEADER_BYTES: usize = 40;

/// What the values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// What each rank gives to a collective operation.
    Exchange,
    /// Each rank's columns of the logits of a step: the step is done.
    Columns,
    /// Hidden states for the next stage, the same on every rank of a stage: one speaks for all.
    Hidden,
}

/// What stands before the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) epoch: u64,
    pub(super) sequence: u64,
    pub(super) first_rank: u16,
    pub(super) ranks: u16,
    /// Of each rank.
    pub(super) values: u32,
    pub(super) payload_crc: u32,
}

/// Bytes that are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("not a frame of ranks")]
    Magic,
    #[error("a frame of version {0}, this worker speaks {PROTOCOL_VERSION}")]
    Version(u16),
    #[error("a frame of an unknown kind")]
    Kind,
    #[error("a checksum does not match")]
    Checksum,
}

impl Header {
    /// Of the payload.
    pub(super) fn payload_bytes(&self) -> usize {
        usize::from(self.ranks) * self.values as usize * VALUE_BYTES
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let Self { kind, epoch, sequence, first_rank, ranks, values, payload_crc } = self;
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[6] = match kind {
            Kind::Exchange => 0,
            Kind::Columns => 1,
            Kind::Hidden => 2,
        };
        bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
        bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
        bytes[24..26].copy_from_slice(&first_rank.to_le_bytes());
        bytes[26..28].copy_from_slice(&ranks.to_le_bytes());
        bytes[28..32].copy_from_slice(&values.to_le_bytes());
        bytes[32..36].copy_from_slice(&payload_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        if bytes[0..4] != MAGIC {
            return Err(FrameError::Magic);
        }
        if crc32fast::hash(&bytes[..CRC_AT]) != u32_at(bytes, CRC_AT) {
            return Err(FrameError::Checksum);
        }
        let version = u16_at(bytes, 4);
        if version != PROTOCOL_VERSION {
            return Err(FrameError::Version(version));
        }
        let kind = match bytes[6..8] {
            [0, 0] => Kind::Exchange,
            [1, 0] => Kind::Columns,
            [2, 0] => Kind::Hidden,
            _ => return Err(FrameError::Kind),
        };
        Ok(Self {
            kind,
            epoch: u64_at(bytes, 8),
            sequence: u64_at(bytes, 16),
            first_rank: u16_at(bytes, 24),
            ranks: u16_at(bytes, 26),
            values: u32_at(bytes, 28),
            payload_crc: u32_at(bytes, 32),
        })
    }
}

/// The values of each rank, one after the other.
pub(super) fn payload(ranks: &[&[f32]]) -> Vec<u8> {
    let values = ranks.iter().map(|values| values.len()).sum::<usize>();
    let mut bytes = vec![0; values * VALUE_BYTES];
    let values = ranks.iter().flat_map(|values| values.iter());
    for (place, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *place = value.to_le_bytes();
    }
    bytes
}

/// The values of each rank, once the checksum matches.
pub(super) fn values(header: &Header, payload: &[u8]) -> Result<Vec<Vec<f32>>, FrameError> {
    if crc32fast::hash(payload) != header.payload_crc || payload.len() != header.payload_bytes() {
        return Err(FrameError::Checksum);
    }
    let of_rank = |rank: usize| {
        let width = header.values as usize * VALUE_BYTES;
        let bytes = &payload[rank * width..(rank + 1) * width];
        bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
    };
    Ok((0..usize::from(header.ranks)).map(of_rank).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(payload: &[u8]) -> Header {
        Header {
            kind: Kind::Columns,
            epoch: 1 << 60,
            sequence: 7,
            first_rank: 3,
            ranks: 2,
            values: 3,
            payload_crc: crc32fast::hash(payload),
        }
    }

    #[test]
    fn what_is_sent_arrives() {
        let ranks = [[1.5, -0.0, f32::MIN_POSITIVE], [f32::INFINITY, 0.1, -3.0]];
        let payload = payload(&[&ranks[0], &ranks[1]]);
        let header = header(&payload);
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        let arrived = values(&header, &payload).unwrap();
        for (sent, arrived) in ranks.iter().zip(arrived) {
            assert!(sent.iter().zip(&arrived).all(|(sent, arrived)| sent.to_bits() == arrived.to_bits()));
        }
    }

    #[test]
    fn a_bit_that_changed_is_seen() {
        let payload = payload(&[&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0]]);
        let header = header(&payload);
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit}");
        }
        for bit in 0..payload.len() * 8 {
            let mut payload = payload.clone();
            payload[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(values(&header, &payload), Err(FrameError::Checksum), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), HEADER_BYTES)) {
            prop_assert!(Header::decode(bytes.first_chunk().unwrap()).is_err());
        }
    }
}
