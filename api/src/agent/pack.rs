//! Large frames, packed: LZ4 blocks in binary frames that no log frame can be mistaken for.
//!
//! Agreed on in the WebSocket's handshake ([`HEADER`], the same from both ends), so an end that knows nothing of it never sees one. A packed
//! frame is 8 bytes 0xff (as a log frame it would be of a stream that is never opened), its kind, the size of what is in it (4 bytes, little
//! endian) and the block. The trap: sizes are somebody's word. One over [`FRAME_BYTES_MAX`] or beyond what the block can hold is refused before
//! anything is made room for, and what comes out must be of exactly that size.

use super::FRAME_BYTES_MAX;

/// Header of the handshake: the agent names what it can read and write, the coordinator what is taken.
pub const HEADER: &str = "everlit-packing";
/// The one packing there is.
pub const LZ4: &str = "lz4";
/// Shorter frames go as they are: a packet has room for them.
pub const PACK_BYTES_MIN: usize = 1_024;

const MARK: [u8; 8] = [0xff; 8];
const HEADER_BYTES: usize = MARK.len() + 1 + 4;
/// A byte of an LZ4 block stands for so many at most.
const RATIO_MAX: usize = 255;

/// What is in a packed frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unpacked {
    /// A JSON frame.
    Text(String),
    /// A binary frame.
    Binary(Vec<u8>),
}

/// Why a packed frame can not be read; its link ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPacking {
    /// It would be larger than any frame may be.
    #[error("a packed frame of {0} bytes: {FRAME_BYTES_MAX} are the most")]
    TooLarge(usize),
    /// What is in it is not what its header says.
    #[error("a packed frame that is torn")]
    Torn,
    /// The text in it is none.
    #[error("a packed text frame that is not UTF-8")]
    NotText,
    /// Of a kind that nobody agreed on.
    #[error("a packed frame of unknown kind {0}")]
    Unknown(u8),
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Text = 1,
    Binary = 2,
}

/// A JSON frame, packed; `None` where that does not pay.
pub fn pack_text(text: &str) -> Option<Vec<u8>> {
    pack(Kind::Text, text.as_bytes())
}

/// A binary frame, packed; `None` where that does not pay.
pub fn pack_binary(bytes: &[u8]) -> Option<Vec<u8>> {
    pack(Kind::Binary, bytes)
}

fn pack(kind: Kind, bytes: &[u8]) -> Option<Vec<u8>> {
    if bytes.len() < PACK_BYTES_MIN || bytes.len() > FRAME_BYTES_MAX {
        return None;
    }
    let size = u32::try_from(bytes.len()).ok()?;
    let mut out = vec![0; HEADER_BYTES + lz4_flex::block::get_maximum_output_size(bytes.len())];
    out[..MARK.len()].copy_from_slice(&MARK);
    out[MARK.len()] = kind as u8;
    out[MARK.len() + 1..HEADER_BYTES].copy_from_slice(&size.to_le_bytes());
    let packed = lz4_flex::block::compress_into(bytes, &mut out[HEADER_BYTES..]).ok()?;
    out.truncate(HEADER_BYTES + packed);
    // Less than an eighth saved is not worth the other end's time.
    (out.len() <= bytes.len() - bytes.len() / 8).then_some(out)
}

/// What is in a binary frame, where it is a packed one.
pub fn unpack(frame: &[u8]) -> Result<Option<Unpacked>, BadPacking> {
    let Some(rest) = frame.strip_prefix(&MARK) else { return Ok(None) };
    let Some((&[kind, a, b, c, d], block)) = rest.split_first_chunk() else { return Err(BadPacking::Torn) };
    let size = u32::from_le_bytes([a, b, c, d]) as usize;
    if size > FRAME_BYTES_MAX {
        return Err(BadPacking::TooLarge(size));
    }
    if size > block.len().saturating_mul(RATIO_MAX) {
        return Err(BadPacking::Torn);
    }
    let bytes = lz4_flex::block::decompress(block, size).ok().filter(|bytes| bytes.len() == size).ok_or(BadPacking::Torn)?;
    match kind {
        kind if kind == Kind::Text as u8 => {
            String::from_utf8(bytes).map(|text| Some(Unpacked::Text(text))).map_err(|_| BadPacking::NotText)
        }
        kind if kind == Kind::Binary as u8 => Ok(Some(Unpacked::Binary(bytes))),
        kind => Err(BadPacking::Unknown(kind)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::agent::LogFrame;

    fn beats(ranks: usize) -> String {
        let one = |rank: usize| {
            format!(r#"{{"incarnation":"01J0000000000000000000000A.1.{rank}","heartbeat":true,"step":{},"loss":2.{rank}1}}"#, 100 + rank)
        };
        format!(r#"{{"type":"beats","beats":[{}]}}"#, (0..ranks).map(one).collect::<Vec<_>>().join(","))
    }

    /// A packed frame whose header says this.
    fn forged(kind: u8, size: u32, block: &[u8]) -> Vec<u8> {
        let mut out = MARK.to_vec();
        out.push(kind);
        out.extend(size.to_le_bytes());
        out.extend(block);
        out
    }

    #[test]
    fn what_was_packed_comes_out_and_what_is_small_or_does_not_shrink_goes_as_it_is() {
        let text = beats(64);
        let packed = pack_text(&text).expect("it pays");
        assert!(packed.len() * 3 < text.len(), "{} of {}", packed.len(), text.len());
        assert_eq!(unpack(&packed), Ok(Some(Unpacked::Text(text.clone()))));
        let log = LogFrame { stream: 1, segment: 2, offset: 3, skipped: 0, caught_up: false }.encode(text.as_bytes());
        let packed = pack_binary(&log).expect("it pays");
        assert_eq!(unpack(&packed), Ok(Some(Unpacked::Binary(log.clone()))));
        assert_eq!(unpack(&log), Ok(None), "a log frame is none");
        assert_eq!(pack_text(&text[..PACK_BYTES_MIN - 1]), None);
        let noise: Vec<u8> = (0..4_096u64).map(|n| (n.wrapping_mul(6_364_136_223_846_793_005) >> 33) as u8 ^ (n * n % 251) as u8).collect();
        assert!(pack_binary(&noise).is_none_or(|packed| packed.len() < noise.len()));
    }

    #[test]
    fn a_bomb_is_refused_before_anything_is_made_room_for() {
        // What a block of zeros comes to: it says so itself.
        let bomb = lz4_flex::block::compress(&vec![b' '; FRAME_BYTES_MAX + 1]);
        assert!(bomb.len() < 70_000, "{}", bomb.len());
        assert_eq!(unpack(&forged(1, FRAME_BYTES_MAX as u32 + 1, &bomb)), Err(BadPacking::TooLarge(FRAME_BYTES_MAX + 1)));
        assert_eq!(unpack(&forged(1, u32::MAX, &bomb)), Err(BadPacking::TooLarge(u32::MAX as usize)));
        // It says less than it holds, or more than it can hold.
        assert_eq!(unpack(&forged(1, 1_000, &bomb)), Err(BadPacking::Torn));
        assert_eq!(unpack(&forged(1, FRAME_BYTES_MAX as u32, &bomb[..100])), Err(BadPacking::Torn));
    }

    #[test]
    fn what_is_torn_or_no_text_or_of_another_kind_is_refused() {
        let block = lz4_flex::block::compress(&[0xff; 2_000]);
        assert_eq!(unpack(&forged(1, 2_000, &block)), Err(BadPacking::NotText));
        assert_eq!(unpack(&forged(3, 2_000, &block)), Err(BadPacking::Unknown(3)));
        assert_eq!(unpack(&forged(2, 1_999, &block)), Err(BadPacking::Torn));
        assert_eq!(unpack(&forged(2, 2_001, &block)), Err(BadPacking::Torn));
        for end in MARK.len()..HEADER_BYTES {
            assert_eq!(unpack(&forged(2, 0, &[])[..end]), Err(BadPacking::Torn));
        }
        let sentence = BadPacking::TooLarge(17).to_string();
        assert_eq!(sentence, "a packed frame of 17 bytes: 16777216 are the most");
    }

    proptest! {
        #[test]
        fn any_text_comes_back_as_it_was(text in "[a-z\":,{}0-9é]{0,6000}") {
            if let Some(packed) = pack_text(&text) {
                prop_assert!(packed.len() < text.len());
                prop_assert_eq!(unpack(&packed), Ok(Some(Unpacked::Text(text))));
            }
        }

        #[test]
        fn no_bytes_do_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), kind in 0u8..4, size in 0u32..100_000) {
            let _ = unpack(&bytes);
            bytes = forged(kind, size, &bytes);
            if let Ok(Some(Unpacked::Binary(out))) = unpack(&bytes) {
                prop_assert_eq!(out.len(), size as usize);
            }
        }
    }
}
