//! A KV frame on the wire, and nothing of where it goes. Pure.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 4 | `HKVF` |
//! | 4 | 2 | version |
//! | 6 | 1 | dtype |
//! | 7 | 1 | 0 |
//! | 8 | 8 | transfer |
//! | 16 | 8 | epoch of the receiving gang |
//! | 24 | 2 + 2 | absolute layers, start and end |
//! | 28 | 2 + 2 | absolute KV heads, start and end |
//! | 32 | 4 | block, counted from the start of the sequence |
//! | 36 | 2 | rows, counted from the start of the block |
//! | 38 | 2 | 0 |
//! | 40 | 4 | bytes of payload |
//! | 44 | 4 | CRC-32 of bytes 0..44 and the payload |
//!
//! Numbers are little endian. The payload is, for each layer, `[2, heads, rows, head_dim]` as in [`herd_engine::KvSlab`].

use std::ops::Range;

use herd_model::Dtype;

use super::PROTOCOL_VERSION;

const MAGIC: [u8; 4] = *b"HKVF";
const CRC_AT: usize = 44;

/// Bytes of a frame before its payload.
pub const HEADER_BYTES: usize = 48;

/// What a frame carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Named by the receiving gang, unique in its epoch.
    pub transfer: u64,
    /// Of the receiving gang.
    pub epoch: u64,
    /// Of the numbers in the payload.
    pub dtype: Dtype,
    /// Absolute.
    pub layers: Range<u16>,
    /// Absolute.
    pub heads: Range<u16>,
    /// Counted from the start of the sequence.
    pub block: u32,
    /// Counted from the start of the block.
    pub rows: u16,
}

/// Bytes that are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Other magic, a reserved field that is not 0, an empty range, or a length that does not follow from the rest.
    #[error("kv frame header: {0}")]
    Header(&'static str),
    /// Another protocol.
    #[error("kv frame of version {0}, this worker speaks {PROTOCOL_VERSION}")]
    Version(u16),
    /// Header or payload were damaged.
    #[error("kv frame: checksum does not match")]
    Checksum,
}

/// What a header says before its payload, and so its checksum, is seen: good for reading on, not for acting on.
#[derive(Debug)]
pub struct ClaimedHeader {
    header: FrameHeader,
    payload_bytes: usize,
    /// Of the header.
    hasher: crc32fast::Hasher,
    crc: u32,
}

impl FrameHeader {
    /// Bytes of payload that a frame like this has, where one row of one head takes `row_bytes`.
    pub fn payload_bytes(&self, row_bytes: usize) -> usize {
        self.layers.len() * 2 * self.heads.len() * usize::from(self.rows) * row_bytes
    }

    /// The bytes that go before this payload.
    pub fn encode(&self, payload: &[u8]) -> [u8; HEADER_BYTES] {
        let Self { transfer, epoch, dtype, layers, heads, block, rows } = self;
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[6] = dtype_code(*dtype);
        bytes[8..16].copy_from_slice(&transfer.to_le_bytes());
        bytes[16..24].copy_from_slice(&epoch.to_le_bytes());
        bytes[24..26].copy_from_slice(&layers.start.to_le_bytes());
        bytes[26..28].copy_from_slice(&layers.end.to_le_bytes());
        bytes[28..30].copy_from_slice(&heads.start.to_le_bytes());
        bytes[30..32].copy_from_slice(&heads.end.to_le_bytes());
        bytes[32..36].copy_from_slice(&block.to_le_bytes());
        bytes[36..38].copy_from_slice(&rows.to_le_bytes());
        bytes[40..44].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[..CRC_AT]);
        hasher.update(payload);
        bytes[CRC_AT..].copy_from_slice(&hasher.finalize().to_le_bytes());
        bytes
    }
}

impl ClaimedHeader {
    /// Reads a header. The length of the payload has to follow from layers, heads, rows and `row_bytes`, so that a damaged
    /// length is an error now and not a read that waits for bytes that never come.
    pub fn parse(bytes: &[u8; HEADER_BYTES], row_bytes: usize) -> Result<Self, FrameError> {
        if bytes[0..4] != MAGIC {
            return Err(FrameError::Header("not a kv frame"));
        }
        let version = u16_at(bytes, 4);
        if version != PROTOCOL_VERSION {
            return Err(FrameError::Version(version));
        }
        let dtype = dtype_of(bytes[6]).ok_or(FrameError::Header("unknown dtype"))?;
        if bytes[7] != 0 || bytes[38..40] != [0, 0] {
            return Err(FrameError::Header("a reserved byte is not 0"));
        }
        let header = FrameHeader {
            transfer: u64_at(bytes, 8),
            epoch: u64_at(bytes, 16),
            dtype,
            layers: u16_at(bytes, 24)..u16_at(bytes, 26),
            heads: u16_at(bytes, 28)..u16_at(bytes, 30),
            block: u32_at(bytes, 32),
            rows: u16_at(bytes, 36),
        };
        if header.layers.is_empty() || header.heads.is_empty() || header.rows == 0 {
            return Err(FrameError::Header("carries nothing"));
        }
        let payload_bytes = u32_at(bytes, 40) as usize;
        if payload_bytes != header.payload_bytes(row_bytes) {
            return Err(FrameError::Header("length of the payload does not follow from the rest"));
        }
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[..CRC_AT]);
        Ok(Self { header, payload_bytes, hasher, crc: u32_at(bytes, CRC_AT) })
    }

    /// Bytes to read next.
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// The header, once the checksum over both matches.
    pub fn verify(self, payload: &[u8]) -> Result<FrameHeader, FrameError> {
        let Self { header, payload_bytes, mut hasher, crc } = self;
        hasher.update(payload);
        if payload.len() == payload_bytes && hasher.finalize() == crc {
            Ok(header)
        } else {
            Err(FrameError::Checksum)
        }
    }
}

pub(super) fn dtype_code(dtype: Dtype) -> u8 {
    match dtype {
        Dtype::F32 => 1,
        Dtype::Bf16 => 2,
    }
}

fn dtype_of(code: u8) -> Option<Dtype> {
    [Dtype::F32, Dtype::Bf16].into_iter().find(|&dtype| dtype_code(dtype) == code)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROW_BYTES: usize = 8;

    fn decode(bytes: &[u8]) -> Result<(FrameHeader, &[u8]), FrameError> {
        let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let claimed = ClaimedHeader::parse(header, ROW_BYTES)?;
        // A stream would wait for more or leave some; neither may happen in silence.
        assert_eq!(claimed.payload_bytes(), payload.len());
        Ok((claimed.verify(payload)?, payload))
    }

    fn any_frame() -> impl Strategy<Value = (FrameHeader, Vec<u8>)> {
        let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::Bf16)];
        let layers = (0..200_u16, 1..3_u16).prop_map(|(start, length)| start..start + length);
        let heads = (0..200_u16, 1..4_u16).prop_map(|(start, length)| start..start + length);
        (any::<u64>(), any::<u64>(), dtype, layers, heads, any::<u32>(), 1..64_u16)
            .prop_map(|(transfer, epoch, dtype, layers, heads, block, rows)| FrameHeader {
                transfer,
                epoch,
                dtype,
                layers,
                heads,
                block,
                rows,
            })
            .prop_flat_map(|header| {
                let bytes = header.payload_bytes(ROW_BYTES);
                (Just(header), prop::collection::vec(any::<u8>(), bytes))
            })
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded((header, payload) in any_frame()) {
            let bytes = [&header.encode(&payload)[..], &payload].concat();
            prop_assert_eq!(decode(&bytes), Ok((header, &payload[..])));
        }

        #[test]
        fn one_flipped_bit_is_an_error((header, payload) in any_frame(), at in any::<prop::sample::Index>()) {
            let mut bytes = [&header.encode(&payload)[..], &payload].concat();
            let bit = at.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode(&bytes).is_err(), "bit {}", bit);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), HEADER_BYTES)) {
            let header = bytes.first_chunk().unwrap();
            prop_assert!(ClaimedHeader::parse(header, ROW_BYTES).is_err());
        }
    }

    #[test]
    fn every_bit_of_a_header_counts() {
        let header = FrameHeader {
            transfer: 1,
            epoch: 2,
            dtype: Dtype::F32,
            layers: 3..4,
            heads: 5..6,
            block: 7,
            rows: 8,
        };
        let payload = vec![9; header.payload_bytes(ROW_BYTES)];
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = [&header.encode(&payload)[..], &payload].concat();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes).is_err(), "bit {bit}");
        }
    }
}
