//! Random numbers without state: each is a pure function of a seed, a stream's name and a position.
//!
//! Nothing has to be saved with a checkpoint, and no rank's death loses a generator. Not for secrets.

/// A stream of numbers, addressed by position.
#[derive(Debug, Clone, Copy)]
pub struct Stream(u64);

impl Stream {
    /// The stream of a name under a seed.
    pub fn new(seed: u64, name: &str) -> Self {
        let fold = |state: u64, byte: u8| (state ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        Self(mix(name.bytes().fold(mix(seed), fold)))
    }

    /// A stream within this one.
    pub fn child(self, number: u64) -> Self {
        Self(mix(self.0 ^ mix(number)))
    }

    /// 64 even bits.
    pub fn bits(self, position: u64) -> u64 {
        mix(self.0.wrapping_add(position.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
    }

    /// A number of the standard normal distribution.
    pub fn normal(self, position: u64) -> f32 {
        let unit = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        let (a, b) = (unit(self.bits(2 * position)), unit(self.bits(2 * position + 1)));
        ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    }
}

/// The finalizer of splitmix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A shuffle of `0..length` that is computed, not stored: a Feistel network over the next even power of two, walked
/// until it lands inside.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    keys: Stream,
    length: u64,
    half_bits: u32,
}

impl Permutation {
    /// The shuffle of a stream.
    pub fn new(keys: Stream, length: u64) -> Self {
        let bits = u64::BITS - length.saturating_sub(1).leading_zeros();
        Self { keys, length, half_bits: bits.div_ceil(2).max(1) }
    }

    /// Where `index` goes. Each index below the length has one image, below the length too.
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.length, "an index inside the permutation");
        let mut image = self.round_trip(index);
        // A bijection of a domain at most four times as large: the walk comes back inside, in two steps on average.
        while image >= self.length {
            image = self.round_trip(image);
        }
        image
    }

    fn round_trip(&self, index: u64) -> u64 {
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (index >> self.half_bits, index & mask);
        for round in 0..6 {
            let mixed = self.keys.child(round).bits(right) & mask;
            (left, right) = (right, left ^ mixed);
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_hits_everything_once() {
        for length in [1, 2, 3, 4, 5, 16, 17, 1000, 4097] {
            let shuffle = Permutation::new(Stream::new(7, "data"), length);
            let mut images: Vec<u64> = (0..length).map(|index| shuffle.at(index)).collect();
            assert!(length < 10 || images.windows(2).filter(|pair| pair[1] == pair[0] + 1).count() < length as usize / 4);
            images.sort_unstable();
            assert_eq!(images, (0..length).collect::<Vec<_>>());
        }
    }

    #[test]
    fn streams_differ_by_seed_name_and_position() {
        let one = Stream::new(1, "a");
        assert_ne!(one.bits(0), one.bits(1));
        assert_ne!(one.bits(0), Stream::new(2, "a").bits(0));
        assert_ne!(one.bits(0), Stream::new(1, "b").bits(0));
        assert_ne!(one.bits(0), one.child(0).bits(0));
        assert_eq!(one.bits(3), Stream::new(1, "a").bits(3));
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_variance_one() {
        let stream = Stream::new(3, "n");
        let numbers: Vec<f64> = (0..100_000).map(|position| f64::from(stream.normal(position))).collect();
        let mean = numbers.iter().sum::<f64>() / 1e5;
        let variance = numbers.iter().map(|x| x * x).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
    }
}
