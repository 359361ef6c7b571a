//! The one source of chance: a seed and the name of a stream, so that more chance in one stream never shifts another.

/// Splitmix64.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// A stream of its own for each name.
    pub(super) fn new(seed: u64, stream: &str) -> Self {
        // FNV-1a: the same on every machine, which the standard library's hashers do not promise.
        let name = stream.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut own = Self(seed ^ name);
        own.next();
        own
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// From 0 to below `bound`.
    pub(super) fn below(&mut self, bound: u32) -> u32 {
        ((self.unit() * f64::from(bound)) as u32).min(bound.saturating_sub(1))
    }

    /// Exponentially distributed with mean 1.
    pub(super) fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }
}
