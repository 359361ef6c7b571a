//! The one door to a store: opening it, and the few things that are done with it. Each has a time limit, and each fault says what was asked.
//!
//! Retries are the store client's own, few and with growing pauses; who calls has a budget above that. A folder answers as a bucket does,
//! and what is put there is on the disk before it counts.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use object_store::path::{Path, PathPart};
use object_store::{
    BackoffConfig, ClientOptions, Error, GetOptions, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutPayload, RetryConfig,
    UpdateVersion,
};

use super::fault::Fault;
use super::parts::ByParts;
use super::place::{Place, Scheme};
use super::settings::Settings;
use super::trouble::Trouble;

const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Without a byte from the other side: the first of an answer, or the next.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// A request with all of its answer's head; a body has [`SILENCE_MAX`] between its pieces.
const REQUEST_MAX: Duration = Duration::from_secs(10 * 60);
const RETRIES_MAX: usize = 4;
const RETRY_MAX: Duration = Duration::from_secs(45);
/// Objects that one listing names at most.
const LISTED_MAX: usize = 1_000_000;

/// A place that was opened. Nothing is sent before it is used.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    /// The same, but for a folder.
    parts: Option<ByParts>,
    place: Place,
    /// Where all keys begin.
    base: Path,
    who: String,
}

/// A version of an object, for putting another in its place only as long as nobody else has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    version: Option<UpdateVersion>,
}

/// What a store tells of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// Its name, from where it was asked for.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// The store's tag of its content.
    pub etag: Option<String>,
}

impl Store {
    /// Opens a place with what is set.
    pub fn open(place: &Place, settings: &Settings) -> Result<Self, Fault> {
        let asked = || format!("open {place}");
        let wrong = |error: Error| Fault::new(Trouble::Settings, asked(), error.to_string());
        // The first that needs a provider for TLS sets it, for the whole process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig {
            backoff: BackoffConfig { init_backoff: Duration::from_millis(200), max_backoff: Duration::from_secs(5), base: 2.0 },
            max_retries: RETRIES_MAX,
            retry_timeout: RETRY_MAX,
        };
        let client = || ClientOptions::new().with_connect_timeout(CONNECT_MAX).with_read_timeout(SILENCE_MAX).with_timeout(REQUEST_MAX);
        let plain = |endpoint: Option<&str>| endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"));
        let scheme = place.scheme();
        let (inner, parts): (Arc<dyn ObjectStore>, ByParts) = match scheme {
            Scheme::S3 => {
                let endpoint = settings.get("AWS_ENDPOINT_URL_S3").or(settings.get("AWS_ENDPOINT_URL")).or(settings.get("AWS_ENDPOINT"));
                let mut builder = AmazonS3Builder::new()
                    .with_client_options(client().with_allow_http(plain(endpoint)))
                    // TLS proves what arrives; without it each body is hashed and signed.
                    .with_unsigned_payload(!plain(endpoint))
                    .with_retry(retry)
                    .with_bucket_name(place.bucket());
                for (name, value) in settings.of(scheme) {
                    if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>()
                        && !matches!(key, AmazonS3ConfigKey::Bucket | AmazonS3ConfigKey::Client(_) | AmazonS3ConfigKey::ConditionalPut)
                    {
                        builder = builder.with_config(key, value);
                    }
                }
                if let Some(endpoint) = endpoint {
                    builder = builder.with_endpoint(endpoint);
                }
                both(builder.build().map_err(wrong)?)
            }
            Scheme::Gcs => {
                let mut builder = GoogleCloudStorageBuilder::new()
                    .with_client_options(client().with_allow_http(plain(settings.get("GOOGLE_BASE_URL"))))
                    .with_retry(retry)
                    .with_bucket_name(place.bucket());
                for (name, value) in settings.of(scheme) {
                    if let Ok(key) = name.to_ascii_lowercase().parse::<GoogleConfigKey>()
                        && !matches!(key, GoogleConfigKey::Bucket | GoogleConfigKey::Client(_))
                    {
                        builder = builder.with_config(key, value);
                    }
                }
                both(builder.build().map_err(wrong)?)
            }
            Scheme::Azure => {
                let mut builder = MicrosoftAzureBuilder::new()
                    .with_client_options(client().with_allow_http(plain(settings.get("AZURE_STORAGE_ENDPOINT"))))
                    .with_retry(retry)
                    .with_container_name(place.bucket());
                for (name, value) in settings.of(scheme) {
                    if let Ok(key) = name.to_ascii_lowercase().parse::<AzureConfigKey>()
                        && !matches!(key, AzureConfigKey::ContainerName | AzureConfigKey::Client(_))
                    {
                        builder = builder.with_config(key, value);
                    }
                }
                both(builder.build().map_err(wrong)?)
            }
            Scheme::Folder => return Self::open_folder(place, settings),
        };
        let base = Path::parse(place.path()).map_err(|error| Fault::new(Trouble::Settings, asked(), error.to_string()))?;
        Ok(Self { inner, parts: Some(parts), place: place.clone(), base, who: settings.who(scheme) })
    }

    /// A folder must be there: one that is not mounted would be made on the wrong disk.
    fn open_folder(place: &Place, settings: &Settings) -> Result<Self, Fault> {
        let root = format!("/{}", place.path());
        let local = LocalFileSystem::new_with_prefix(&root).map_err(|_| {
            let why = format!("there is no folder {root} on this machine: make it, or mount it");
            Fault::new(Trouble::NoBucket, format!("open {place}"), why)
        })?;
        let who = settings.who(place.scheme());
        Ok(Self { inner: Arc::new(local.with_fsync(true)), parts: None, place: place.clone(), base: Path::default(), who })
    }

    /// One that is only in memory.
    #[cfg(test)]
    pub(super) fn in_memory(inner: impl ObjectStore + MultipartStore) -> Self {
        let place: Place = "s3://memory/jobs".parse().expect("a place");
        let (inner, parts) = both(inner);
        Self { inner, parts: Some(parts), base: Path::from(place.path()), place, who: "the test".into() }
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The same store, further in.
    pub fn at(&self, name: &str) -> Self {
        Self { place: self.place.join(name), base: self.base.clone().join(as_it_is(name)), ..self.clone() }
    }

    pub(super) fn key(&self, name: &str) -> Path {
        let mut key = self.base.clone();
        for part in name.split('/').filter(|part| !part.is_empty()) {
            key = key.join(as_it_is(part));
        }
        key
    }

    pub(super) fn fault(&self, verb: &str, name: &str, error: &Error) -> Fault {
        let whole = if name.is_empty() { self.place.to_string() } else { format!("{}/{name}", self.place) };
        Fault::from_store(format!("{verb} {whole}"), error, &self.who, self.place.bucket())
    }

    /// Everything below `name`, by its name from here, with its length, in order.
    pub async fn list(&self, name: &str) -> Result<Vec<(String, u64)>, Fault> {
        Ok(self.list_all(name).await?.into_iter().map(|about| (about.name, about.bytes)).collect())
    }

    /// Everything below `name`, in order of names from here.
    pub async fn list_all(&self, name: &str) -> Result<Vec<About>, Fault> {
        let prefix = self.key(name);
        let mut all = self.inner.list(Some(&prefix));
        let mut found = Vec::new();
        while let Some(next) = all.next().await {
            let about = match next {
                Ok(about) => about,
                // A folder that nobody has made yet has nothing in it.
                Err(Error::NotFound { .. }) if self.place.scheme() == Scheme::Folder => continue,
                Err(error) => return Err(self.fault("list", name, &error)),
            };
            if found.len() >= LISTED_MAX {
                return Err(Fault::new(Trouble::Other, format!("list {}", self.place), format!("it has more than {LISTED_MAX} objects")));
            }
            if let Some(parts) = about.location.prefix_match(&self.base) {
                let own: Vec<String> = parts.map(|part| part.as_ref().to_string()).collect();
                found.push(About { name: own.join("/"), bytes: about.size, etag: about.e_tag });
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// What an object is, without its content.
    pub async fn head(&self, name: &str) -> Result<About, Fault> {
        let about = self.inner.head(&self.key(name)).await.map_err(|error| self.fault("look at", name, &error))?;
        Ok(About { name: name.into(), bytes: about.size, etag: about.e_tag })
    }

    /// An object as it comes, if it still is what was seen; `Conflict` when it is another one.
    pub async fn stream_as_seen(&self, seen: &About) -> Result<BoxStream<'static, Result<Bytes, Fault>>, Fault> {
        let name = seen.name.as_str();
        let options = GetOptions { if_match: seen.etag.clone(), ..GetOptions::default() };
        let answer = self.inner.get_opts(&self.key(name), options).await.map_err(|error| self.fault("get", name, &error))?;
        // A store may not know the condition.
        let is_other = seen.etag.is_some() && answer.meta.e_tag != seen.etag;
        if is_other || answer.meta.size != seen.bytes {
            let why = format!("it is another one than was seen before ({} bytes then, {} now)", seen.bytes, answer.meta.size);
            return Err(Fault::new(Trouble::Conflict, format!("get {}/{name}", self.place), why));
        }
        let (own, name) = (self.clone(), name.to_string());
        Ok(answer.into_stream().map(move |piece| piece.map_err(|error| own.fault("get", &name, &error))).boxed())
    }

    /// A whole object of at most `bytes_max`. `None`: there is none.
    pub async fn get(&self, name: &str, bytes_max: u64) -> Result<Option<(Bytes, Written)>, Fault> {
        let answer = match self.inner.get(&self.key(name)).await {
            Ok(answer) => answer,
            Err(error) => {
                let fault = self.fault("get", name, &error);
                return if fault.trouble == Trouble::NotFound { Ok(None) } else { Err(fault) };
            }
        };
        if answer.meta.size > bytes_max {
            let why = format!("it has {} bytes, more than {bytes_max}", answer.meta.size);
            return Err(Fault::new(Trouble::Damaged, format!("get {}/{name}", self.place), why));
        }
        let version = Some(UpdateVersion { e_tag: answer.meta.e_tag.clone(), version: answer.meta.version.clone() });
        let bytes = answer.bytes().await.map_err(|error| self.fault("get", name, &error))?;
        Ok(Some((bytes, Written { version })))
    }

    /// An object as it comes, with its length.
    pub async fn stream(&self, name: &str) -> Result<(u64, BoxStream<'static, Result<Bytes, Fault>>), Fault> {
        let answer = self.inner.get(&self.key(name)).await.map_err(|error| self.fault("get", name, &error))?;
        let (own, name, bytes) = (self.clone(), name.to_string(), answer.meta.size);
        Ok((bytes, answer.into_stream().map(move |piece| piece.map_err(|error| own.fault("get", &name, &error))).boxed()))
    }

    /// Puts an object where none may be. `Conflict` when there is one.
    pub async fn create(&self, name: &str, bytes: Bytes) -> Result<(), Fault> {
        self.put_as(name, bytes, PutMode::Create).await
    }

    /// Puts an object in the place of the one that was read, if that is still there.
    pub async fn replace(&self, name: &str, bytes: Bytes, read: &Written) -> Result<(), Fault> {
        if self.place.scheme() == Scheme::Folder {
            // A folder has no such exchange. Between these two there is none, which is no commit of anybody.
            self.remove(name).await?;
            return self.create(name, bytes).await;
        }
        let version = read.version.clone().unwrap_or(UpdateVersion { e_tag: None, version: None });
        self.put_as(name, bytes, PutMode::Update(version)).await
    }

    /// Puts an object, whatever was there.
    pub async fn put(&self, name: &str, bytes: Bytes) -> Result<(), Fault> {
        self.put_as(name, bytes, PutMode::Overwrite).await
    }

    async fn put_as(&self, name: &str, bytes: Bytes, mode: PutMode) -> Result<(), Fault> {
        let put = self.inner.put_opts(&self.key(name), PutPayload::from(bytes), mode.into()).await;
        put.map(drop).map_err(|error| self.fault("put", name, &error))
    }

    pub(super) fn by_parts(&self) -> Option<&ByParts> {
        self.parts.as_ref()
    }

    pub(super) async fn put_multipart(&self, key: &Path) -> Result<Box<dyn MultipartUpload>, Error> {
        self.inner.put_multipart(key).await
    }

    /// How many bytes an object has. `None`: there is none.
    pub async fn size(&self, name: &str) -> Result<Option<u64>, Fault> {
        match self.inner.head(&self.key(name)).await {
            Ok(about) => Ok(Some(about.size)),
            Err(error) => {
                let fault = self.fault("look at", name, &error);
                if fault.trouble == Trouble::NotFound { Ok(None) } else { Err(fault) }
            }
        }
    }

    /// Removes an object; that there is none is no fault.
    pub async fn remove(&self, name: &str) -> Result<(), Fault> {
        match self.inner.delete(&self.key(name)).await {
            Ok(()) => Ok(()),
            Err(error) => {
                let fault = self.fault("remove", name, &error);
                if fault.trouble == Trouble::NotFound { Ok(()) } else { Err(fault) }
            }
        }
    }
}

/// A part of a key with no character written in another way, as other tools show it.
fn as_it_is(part: &str) -> PathPart<'_> {
    PathPart::parse(part).unwrap_or_else(|_| part.into())
}

fn both(store: impl ObjectStore + MultipartStore) -> (Arc<dyn ObjectStore>, ByParts) {
    let store = Arc::new(store);
    (store.clone(), ByParts(store))
}
