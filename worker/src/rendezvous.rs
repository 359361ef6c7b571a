//! Where ranks of several nodes leave word for each other: a small store of keys that the agent of the first rank's node keeps for an attempt.
//!
//! Whoever knows the attempt's secret may write and read; nothing else is known of them. A connection asks one thing after the other: put a
//! value, wait for one, ask whether there is one. A value stays when its writer dies. Everything is bounded: connections, keys, values,
//! their sum, and the time that one waits.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

/// What a connection begins with, before the secret.
const GREETING: &[u8; 8] = b"EVLMEET1";
/// Characters of a secret.
pub const SECRET_CHARS: usize = 64;
const PUT: u8 = 1;
const WAIT: u8 = 2;
const ASK: u8 = 3;
const YES: u8 = 1;
const NO: u8 = 0;
const KEY_BYTES_MAX: usize = 1024;
const VALUE_BYTES_MAX: usize = 1024 * 1024;
const BYTES_MAX: usize = 256 * 1024 * 1024;
/// Connections beside four for each rank.
const CONNECTIONS_SPARE: usize = 64;
/// Time for a greeting.
const GREETING_MAX: Duration = Duration::from_secs(10);
/// A connection that asks nothing for so long is closed.
const IDLE_MAX: Duration = Duration::from_secs(3_600);
/// Longest time to connect, and to be answered beyond the time that was asked for.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Between two tries to connect: the node that keeps the store may begin a little later.
const RETRY: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct Store {
    values: HashMap<Vec<u8>, Arc<Vec<u8>>>,
    bytes: usize,
}

/// The store of one attempt; it ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Server {
    /// Opens it for an attempt of `world` ranks.
    pub async fn open(address: SocketAddr, secret: &str, world: u32) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let room = Arc::new(Semaphore::new(4 * world as usize + CONNECTIONS_SPARE));
        let shared = Arc::new(Shared { store: Mutex::default(), changed: watch::Sender::new(0), secret: secret.as_bytes().to_vec() });
        let serving = tokio::spawn(async move {
            // Connections end with the store.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok(permit) = room.clone().acquire_owned().await else { return };
                let Ok((stream, _)) = listener.accept().await else {
                    tokio::time::sleep(RETRY).await;
                    continue;
                };
                let shared = shared.clone();
                connections.spawn(async move {
                    // Who breaks off, or is nobody of ours, is gone without a word.
                    let _ = shared.serve(stream).await;
                    drop(permit);
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { address, serving })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    changed: watch::Sender<u64>,
    secret: Vec<u8>,
}

impl Shared {
    fn value(&self, key: &[u8]) -> Option<Arc<Vec<u8>>> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner).values.get(key).cloned()
    }

    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let before = store.values.get(&key).map_or(0, |value| key.len() + value.len());
        let bytes = store.bytes - before + key.len() + value.len();
        if bytes > BYTES_MAX {
            return false;
        }
        store.bytes = bytes;
        store.values.insert(key, Arc::new(value));
        drop(store);
        self.changed.send_modify(|n| *n += 1);
        true
    }

    async fn wait(&self, key: &[u8], timeout: Duration) -> Option<Arc<Vec<u8>>> {
        let mut changes = self.changed.subscribe();
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            if let Some(value) = self.value(key) {
                return Some(value);
            }
            if !matches!(tokio::time::timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
                return self.value(key);
            }
        }
    }

    async fn serve(&self, mut stream: tokio::net::TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut greeting = [0; GREETING.len() + SECRET_CHARS];
        let greeted = async { stream.read_exact(&mut greeting).await };
        tokio::time::timeout(GREETING_MAX, greeted).await.map_err(|_| io::ErrorKind::TimedOut)??;
        let secret = &greeting[GREETING.len()..];
        let is_same = secret.len() == self.secret.len() && secret.iter().zip(&self.secret).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0;
        if !greeting.starts_with(GREETING) || !is_same {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        loop {
            let mut head = [0; 9];
            tokio::time::timeout(IDLE_MAX, stream.read_exact(&mut head)).await.map_err(|_| io::ErrorKind::TimedOut)??;
            let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            let (operation, key_bytes, other) = (head[0], number(1) as usize, number(5));
            let value_bytes = if operation == PUT { other as usize } else { 0 };
            if key_bytes > KEY_BYTES_MAX || value_bytes > VALUE_BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut key = vec![0; key_bytes];
            stream.read_exact(&mut key).await?;
            let mut value = vec![0; value_bytes];
            stream.read_exact(&mut value).await?;
            let found = match operation {
                PUT => self.put(key, value).then(Arc::default),
                WAIT => self.wait(&key, Duration::from_millis(other.into())).await,
                ASK => self.value(&key).map(|_| Arc::default()),
                _ => return Err(io::ErrorKind::InvalidData.into()),
            };
            let mut answer = vec![if found.is_some() { YES } else { NO }];
            let value = found.unwrap_or_default();
            answer.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
            answer.extend_from_slice(&value);
            stream.write_all(&answer).await?;
        }
    }
}

/// A rank's way to the store; from any thread.
#[derive(Debug)]
pub struct Client {
    address: String,
    secret: String,
    /// Connections that nobody uses right now.
    idle: Mutex<Vec<TcpStream>>,
}

impl Client {
    /// To the store at `host:port`; connects when it is first asked.
    pub fn new(address: &str, secret: &str) -> Self {
        Self { address: address.into(), secret: secret.into(), idle: Mutex::default() }
    }

    /// Puts a value; the last one of a key stays.
    pub fn put(&self, key: &str, value: &[u8]) -> io::Result<()> {
        let length = u32::try_from(value.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        match self.ask(PUT, key, length, value, Duration::ZERO)? {
            Some(_) => Ok(()),
            None => Err(io::Error::other("the store that the ranks meet at is full")),
        }
    }

    /// Waits for a value; `None` when it did not come in time.
    pub fn wait(&self, key: &str, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        let ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        self.ask(WAIT, key, ms, &[], timeout)
    }

    /// Whether a key has a value.
    pub fn has(&self, key: &str) -> io::Result<bool> {
        Ok(self.ask(ASK, key, 0, &[], Duration::ZERO)?.is_some())
    }

    fn ask(&self, operation: u8, key: &str, number: u32, value: &[u8], patience: Duration) -> io::Result<Option<Vec<u8>>> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut stream = idle.map_or_else(|| self.connect(), Ok)?;
        stream.set_read_timeout(Some(patience + CONNECT_MAX))?;
        let mut question = vec![operation];
        question.extend_from_slice(&u32::try_from(key.len()).unwrap_or(u32::MAX).to_le_bytes());
        question.extend_from_slice(&number.to_le_bytes());
        question.extend_from_slice(key.as_bytes());
        question.extend_from_slice(value);
        stream.write_all(&question)?;
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > VALUE_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer)?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        Ok((head[0] == YES).then_some(answer))
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let deadline = Instant::now() + CONNECT_MAX;
        loop {
            match self.dial(deadline.saturating_duration_since(Instant::now()).max(RETRY)) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() + RETRY >= deadline => {
                    return Err(io::Error::new(error.kind(), format!("could not reach {}, where the ranks meet: {error}", self.address)));
                }
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }

    fn dial(&self, within: Duration) -> io::Result<TcpStream> {
        let address = self.address.to_socket_addrs()?.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
        let mut stream = TcpStream::connect_timeout(&address, within)?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(CONNECT_MAX))?;
        stream.write_all(GREETING)?;
        stream.write_all(self.secret.as_bytes())?;
        Ok(stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn open(secret: &str) -> Server {
        Server::open("127.0.0.1:0".parse().unwrap(), secret, 2).await.unwrap()
    }

    fn secret(digit: &str) -> String {
        digit.repeat(SECRET_CHARS)
    }

    async fn blocking<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
        tokio::task::spawn_blocking(run).await.unwrap()
    }

    #[tokio::test]
    async fn what_one_says_the_others_hear_also_those_who_waited() {
        let server = open(&secret("a")).await;
        let client = Arc::new(Client::new(&server.address().to_string(), &secret("a")));
        let own = client.clone();
        let waiting = tokio::task::spawn_blocking(move || own.wait("k", Duration::from_secs(60)));
        let own = client.clone();
        blocking(move || {
            assert!(!own.has("k").unwrap());
            assert_eq!(own.wait("k", Duration::from_millis(5)).unwrap(), None);
            own.put("k", b"first").unwrap();
            own.put("k", &[7; 100_000]).unwrap();
            assert!(own.has("k").unwrap() && !own.has("other").unwrap());
        })
        .await;
        let heard = waiting.await.unwrap().unwrap().unwrap();
        assert!(heard == b"first" || heard == [7; 100_000], "the first of a key, or the last");
        blocking(move || assert_eq!(client.wait("k", Duration::ZERO).unwrap().unwrap(), [7; 100_000])).await;
    }

    #[tokio::test]
    async fn who_does_not_know_the_secret_is_told_nothing() {
        let server = open(&secret("a")).await;
        let address = server.address().to_string();
        blocking(move || {
            for wrong in [secret("b"), "a".repeat(63) + "b"] {
                assert!(Client::new(&address, &wrong).put("k", b"v").is_err());
            }
            // No greeting of ours, and questions that are too large.
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.write_all(&[b'x'; 200]).unwrap();
            assert_eq!(stream.read(&mut [0; 8]).unwrap_or(0), 0);
            let good = Client::new(&address, &secret("a"));
            assert!(good.put(&"k".repeat(KEY_BYTES_MAX + 1), b"v").is_err());
            assert!(good.put("k", &vec![0; VALUE_BYTES_MAX + 1]).is_err());
            assert!(!good.has("k").unwrap());
        })
        .await;
    }

    #[test]
    fn a_full_store_takes_no_more_and_keeps_what_it_has() {
        let shared = Shared { store: Mutex::default(), changed: watch::Sender::new(0), secret: Vec::new() };
        for n in 0..255_u32 {
            assert!(shared.put(n.to_le_bytes().to_vec(), vec![0; VALUE_BYTES_MAX]));
        }
        assert!(shared.put(vec![9], vec![0; VALUE_BYTES_MAX - 2_000]));
        assert!(!shared.put(vec![10], vec![0; 2_000]));
        assert!(shared.put(vec![9], vec![1]), "a smaller one in its place");
        assert!(shared.put(vec![10], vec![0; 2_000]));
    }
}
