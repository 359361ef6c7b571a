//! Identifiers as newtypes, so that a job can not be passed where a node is meant.
//!
//! Job ids are lower-case ULIDs: they sort by time and are safe as a file name and in a URL.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A text that is not an id of the asked kind.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a {1}")]
pub struct BadId(String, &'static str);

/// One submitted job: 26 lower-case characters of Crockford's base 32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(u128);

impl JobId {
    /// From the 48-bit millisecond time and 80 random bits of a ULID.
    pub fn from_parts(unix_ms: u64, random: u128) -> Self {
        Self(ulid::Ulid::from_parts(unix_ms, random).0)
    }

    /// The id as a number; ids sort by submission time.
    pub fn as_u128(self) -> u128 {
        self.0
    }

    /// Reads what [`Self::as_u128`] gave.
    pub fn from_u128(number: u128) -> Self {
        Self(number)
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut buffer = [0; ulid::ULID_LEN];
        let text = ulid::Ulid(self.0).array_to_str(&mut buffer);
        text.make_ascii_lowercase();
        f.write_str(text)
    }
}

impl FromStr for JobId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let bad = || BadId(text.chars().take(64).collect(), "job id");
        if text.len() != ulid::ULID_LEN || text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad());
        }
        let id = ulid::Ulid::from_string(text).map_err(|_| bad())?;
        // Crockford's base 32 forgives i, l, o: one job must have one name.
        if Self(id.0).to_string() == text { Ok(Self(id.0)) } else { Err(bad()) }
    }
}

impl Serialize for JobId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for JobId {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl utoipa::PartialSchema for JobId {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        String::schema()
    }
}
impl ToSchema for JobId {}

/// A node's name, unique in a coordinator: the host's name unless set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
pub struct NodeId(pub String);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One started rank, never reused: `<job>-a<attempt>-r<seat>`. Names the run folder and fences stale news.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation {
    /// The job it belongs to.
    pub job: JobId,
    /// The attempt, from 1.
    pub attempt: u32,
    /// Its seat: the number of the process within the attempt. The first ones are the ranks themselves; those that are started later, to
    /// wait or to take a lost rank's place, count on from the world size.
    pub rank: u32,
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-a{}-r{}", self.job, self.attempt, self.rank)
    }
}

impl FromStr for Incarnation {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let parse = || {
            let (job, rest) = text.split_once("-a")?;
            let (attempt, rank) = rest.split_once("-r")?;
            let own = Self { job: job.parse().ok()?, attempt: attempt.parse().ok()?, rank: rank.parse().ok()? };
            (own.to_string() == text).then_some(own)
        };
        parse().ok_or_else(|| BadId(text.chars().take(80).collect(), "incarnation"))
    }
}

impl Serialize for Incarnation {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Incarnation {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_id_reads_back_and_has_one_spelling() {
        let id = JobId::from_parts(1_700_000_000_000, 42);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().to_uppercase().parse::<JobId>().is_err());
        assert!("../../etc/passwd".parse::<JobId>().is_err());
        assert!("".parse::<JobId>().is_err());
    }

    #[test]
    fn an_incarnation_reads_back_from_its_folder_name() {
        let one = Incarnation { job: JobId::from_parts(1, 2), attempt: 3, rank: 65_535 };
        assert_eq!(one.to_string().parse(), Ok(one));
        assert!(format!("{}-a03-r1", one.job).parse::<Incarnation>().is_err());
        assert!("x-a1-r1".parse::<Incarnation>().is_err());
    }
}
