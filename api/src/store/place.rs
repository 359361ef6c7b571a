//! The names of places: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `file:///folder`, `/folder`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Characters of a place's text.
const PLACE_BYTES_MAX: usize = 1024;

/// What kind of store it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scheme {
    /// Amazon S3, or what speaks its language.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
    /// A folder, on this machine or shared by several.
    Folder,
}

impl Scheme {
    fn prefix(self) -> &'static str {
        match self {
            Self::S3 => "s3://",
            Self::Gcs => "gs://",
            Self::Azure => "az://",
            Self::Folder => "/",
        }
    }
}

/// Where something is kept. Its text is the same however it was written: no slash at the end, `file://` as a path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Place {
    scheme: Scheme,
    bucket: String,
    path: String,
}

impl Place {
    /// What kind of store it is.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Bucket or container; empty for a folder.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// Inside the bucket, or below the root; without slashes at its ends, and empty for a whole bucket.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A place inside it; `name` is one segment.
    pub fn join(&self, name: &str) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}/{name}", self.path) };
        Self { path, ..self.clone() }
    }

    /// The place that it is in; `None` for a whole bucket, and for a folder at the root.
    pub fn parent(&self) -> Option<Self> {
        let (path, _) = match self.scheme {
            Scheme::Folder => self.path.rsplit_once('/')?,
            _ => self.path.rsplit_once('/').or_else(|| (!self.path.is_empty()).then_some(("", "")))?,
        };
        Some(Self { path: path.into(), ..self.clone() })
    }

    /// The last part of its name.
    pub fn last(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// Whether a text is to be read as a place in a store, and not as a path of a node.
    pub fn is_url(text: &str) -> bool {
        text.contains("://")
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORMS: &str = "must be s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder or an absolute path";
        if text.len() > PLACE_BYTES_MAX {
            return Err(format!("must have at most {PLACE_BYTES_MAX} characters"));
        }
        let (scheme, rest) = match text.split_once("://") {
            Some(("s3", rest)) => (Scheme::S3, rest),
            Some(("gs", rest)) => (Scheme::Gcs, rest),
            Some(("az", rest)) => (Scheme::Azure, rest),
            Some(("file", rest)) if rest.starts_with('/') => (Scheme::Folder, rest),
            Some(("file", _)) => return Err("must be file:/// and an absolute path: it is a folder of the machine that opens it".into()),
            None if text.starts_with('/') => (Scheme::Folder, text),
            _ => return Err(FORMS.into()),
        };
        let (bucket, path) = match scheme {
            Scheme::Folder => ("", rest),
            _ => rest.split_once('/').unwrap_or((rest, "")),
        };
        if scheme != Scheme::Folder {
            if bucket.is_empty() {
                return Err(format!("names no bucket: {FORMS}"));
            }
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            if bucket.contains('@') {
                return Err("must not hold credentials: give them in the job's `secrets`".into());
            }
            if !bucket.chars().all(plain) || bucket.len() > 255 {
                return Err(format!("`{}` is no name of a bucket", bucket.escape_debug()));
            }
        }
        if scheme != Scheme::Folder && text.contains(['?', '#']) {
            return Err("must have no `?` or `#` in it: settings of a store go in the job's `env`".into());
        }
        let path = path.strip_prefix('/').filter(|_| scheme == Scheme::Folder).unwrap_or(path);
        let path = path.strip_suffix('/').unwrap_or(path);
        if path.is_empty() && scheme == Scheme::Folder {
            return Err("must not be the root of all folders".into());
        }
        for segment in path.split('/').filter(|_| !path.is_empty()) {
            if segment.is_empty() || segment == "." || segment == ".." {
                return Err("must have no empty part, `.` or `..` in it".into());
            }
            if let Some(odd) = segment.chars().find(|c| c.is_control() || matches!(c, '\\' | '*' | '%')) {
                return Err(format!("must not have `{}` in it", odd.escape_debug()));
            }
        }
        Ok(Self { scheme, bucket: bucket.into(), path: path.into() })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.scheme.prefix(), self.bucket)?;
        match (self.scheme, self.path.as_str()) {
            (Scheme::Folder, path) => f.write_str(path),
            (_, "") => Ok(()),
            (_, path) => write!(f, "/{path}"),
        }
    }
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_have_one_spelling() {
        for (text, shown, bucket, path) in [
            ("s3://bucket", "s3://bucket", "bucket", ""),
            ("s3://bucket/", "s3://bucket", "bucket", ""),
            ("s3://my.bucket-1/a/b/", "s3://my.bucket-1/a/b", "my.bucket-1", "a/b"),
            ("gs://b_1/ä ö/x=1", "gs://b_1/ä ö/x=1", "b_1", "ä ö/x=1"),
            ("az://container/p", "az://container/p", "container", "p"),
            ("file:///mnt/shared", "/mnt/shared", "", "mnt/shared"),
            ("/mnt/shared/", "/mnt/shared", "", "mnt/shared"),
        ] {
            let place: Place = text.parse().expect(text);
            assert_eq!((place.to_string().as_str(), place.bucket(), place.path()), (shown, bucket, path), "{text}");
            assert_eq!(shown.parse::<Place>().as_ref(), Ok(&place));
            assert_eq!(place.join("x").to_string(), format!("{shown}/x"));
            assert_eq!((place.join("x").parent(), place.join("x").last()), (Some(place), "x"));
        }
    }

    #[test]
    fn what_is_no_place_is_refused() {
        let refused = [
            ("", "must be s3://"),
            ("bucket/x", "must be s3://"),
            ("http://bucket/x", "must be s3://"),
            ("S3://bucket/x", "must be s3://"),
            ("s3://", "names no bucket"),
            ("s3:///x", "names no bucket"),
            ("s3://key:secret@bucket/x", "must not hold credentials"),
            ("s3://bu cket/x", "is no name of a bucket"),
            ("s3://bucket/a//b", "no empty part"),
            ("s3://bucket/../b", "no empty part"),
            ("s3://bucket/a\nb", "must not have"),
            ("s3://bucket/a%2e%2e/b", "must not have `%`"),
            ("s3://bucket/a?x=1", "no `?`"),
            ("file://host/x", "must be file:///"),
            ("/", "the root"),
            ("/a/../b", "no empty part"),
        ];
        for (text, why) in refused {
            let told = text.parse::<Place>().expect_err(text);
            assert!(told.contains(why), "{text}: {told}");
        }
        assert!(format!("s3://b/{}", "x".repeat(PLACE_BYTES_MAX)).parse::<Place>().is_err());
    }
}
