//! Time as it crosses a boundary: RFC 3339 in UTC with milliseconds, and durations like `500ms` or `10m`.
//!
//! Inside, time is a count of milliseconds. Wall time is for people and records; ages and deadlines use a monotonic clock.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Wall time in milliseconds since 1970, written as RFC 3339.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The host's clock.
    pub fn now() -> Self {
        Self(u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0))
    }

    /// Milliseconds from `earlier` to this, zero when the clock went back.
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = i64::try_from(self.0).unwrap_or(i64::MAX);
        let time = jiff::Timestamp::from_millisecond(ms).unwrap_or(jiff::Timestamp::MAX);
        write!(f, "{time:.3}")
    }
}

impl FromStr for Timestamp {
    type Err = jiff::Error;

    fn from_str(text: &str) -> Result<Self, jiff::Error> {
        let time: jiff::Timestamp = text.parse()?;
        Ok(Self(u64::try_from(time.as_millisecond()).unwrap_or(0)))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl utoipa::PartialSchema for Timestamp {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .format(Some(utoipa::openapi::SchemaFormat::KnownFormat(utoipa::openapi::KnownFormat::DateTime)))
            .into()
    }
}
impl ToSchema for Timestamp {}

/// A length of time in milliseconds, written like `500ms`, `10s`, `2m`, `1h`, `30d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Millis(pub u64);

/// A text that is not a duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("is not a duration: write a number and a unit, like \"500ms\", \"10s\", \"2m\", \"1h\" or \"30d\"")]
pub struct BadDuration;

const UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

impl Millis {
    /// As the standard library has it.
    pub fn as_duration(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.0)
    }

    /// Whole seconds as milliseconds.
    pub const fn secs(seconds: u64) -> Self {
        Self(seconds * 1_000)
    }
}

impl FromStr for Millis {
    type Err = BadDuration;

    fn from_str(text: &str) -> Result<Self, BadDuration> {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(BadDuration)?;
        let (number, unit) = text.split_at(digits);
        let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit).ok_or(BadDuration)?;
        let value: f64 = number.parse().map_err(|_| BadDuration)?;
        let ms = value * *scale as f64;
        // A century bounds every sum of times that is made from this.
        if !ms.is_finite() || ms > 3.2e12 {
            return Err(BadDuration);
        }
        Ok(Self(ms.round() as u64))
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, scale) = UNITS.iter().rev().find(|(_, scale)| self.0 != 0 && self.0.is_multiple_of(*scale)).unwrap_or(&UNITS[1]);
        write!(f, "{}{unit}", self.0 / scale)
    }
}

impl Serialize for Millis {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl utoipa::PartialSchema for Millis {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .pattern(Some(r"^[0-9]+(\.[0-9]+)?(ms|s|m|h|d)$"))
            .examples(["500ms", "10s", "2m"])
            .into()
    }
}
impl ToSchema for Millis {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_and_write() {
        for (text, ms) in [("500ms", 500), ("10s", 10_000), ("2m", 120_000), ("1.5h", 5_400_000), ("30d", 2_592_000_000), ("0s", 0)] {
            assert_eq!(text.parse(), Ok(Millis(ms)), "{text}");
        }
        for text in ["", "5", "-1s", "s", "1 s", "1e9d", "1.2.3s", "99999999d", "NaNs", "infs"] {
            assert_eq!(text.parse::<Millis>(), Err(BadDuration), "{text}");
        }
        assert_eq!(Millis(90_000).to_string(), "90s");
        assert_eq!(Millis(120_000).to_string(), "2m");
        assert_eq!(Millis(0).to_string(), "0s");
    }

    #[test]
    fn timestamps_read_and_write() {
        assert_eq!(Timestamp(1_767_225_600_123).to_string(), "2026-01-01T00:00:00.123Z");
        assert_eq!("2026-01-01T00:00:00.123Z".parse::<Timestamp>().unwrap(), Timestamp(1_767_225_600_123));
    }
}
