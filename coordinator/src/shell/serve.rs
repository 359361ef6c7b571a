//! Connections to the doors, served one task each within bounds: a place for each, and a time for each request's header.
//!
//! A connection that says nothing, or half a header, holds its place for `HEADER_MAX`, one between two requests as long. What is upgraded (an
//! agent's link) keeps its place until it ends. The trap: hyper's header timeout does nothing without a timer.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::Request;
use axum::serve::Listener;
use everlit_api::server::Peer;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::bounds::{Place, Places};

/// From a connection's start, or the end of an answer, to the end of the next request's header.
const HEADER_MAX: Duration = Duration::from_secs(30);
/// Between two warnings that connections are turned away.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// A connection with its place.
struct Placed<Io> {
    io: Io,
    _place: Place,
}

impl<Io: AsyncRead + Unpin> AsyncRead for Placed<Io> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Placed<Io> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Serves whoever comes until it is told to close; then lets answers that are under way end.
pub async fn serve<L: Listener<Addr = Peer>>(listener: L, doors: Router, closing: watch::Receiver<bool>) {
    serve_within(listener, doors, closing, Places::new(), HEADER_MAX).await;
}

async fn serve_within<L: Listener<Addr = Peer>>(
    mut listener: L,
    doors: Router,
    mut closing: watch::Receiver<bool>,
    places: Places,
    header_max: Duration,
) {
    let all = TaskTracker::new();
    let (mut turned_away, mut warned) = (0u64, None::<Instant>);
    loop {
        let (io, peer) = tokio::select! {
            accepted = listener.accept() => accepted,
            () = async { drop(closing.wait_for(|asked| *asked).await) } => break,
        };
        match places.enter(&peer) {
            Ok(place) => drop(all.spawn(one(Placed { io, _place: place }, peer, doors.clone(), closing.clone(), header_max))),
            Err(why) => {
                turned_away += 1;
                if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
                    tracing::warn!(from = %peer.address, "a connection is turned away: {why} ({turned_away} since the start)");
                    warned = Some(Instant::now());
                }
            }
        }
    }
    drop(listener);
    all.close();
    all.wait().await;
}

async fn one<Io: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    io: Io,
    peer: Peer,
    doors: Router,
    mut closing: watch::Receiver<bool>,
    header_max: Duration,
) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(peer));
        doors.clone().oneshot(request.map(Body::new))
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(header_max);
    let mut connection = pin!(http.serve_connection(TokioIo::new(io), service).with_upgrades());
    let asked = async { drop(closing.wait_for(|asked| *asked).await) };
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = asked => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(from = %peer.address, %error, "a connection ended");
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Notify;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::shell::tls::PlainListener;

    const GET: &[u8] = b"GET /who HTTP/1.1\r\nhost: x\r\n\r\n";

    async fn doors(header_max: Duration, turns: Arc<[Notify; 2]>) -> (SocketAddr, watch::Sender<bool>, JoinHandle<()>) {
        let who = |ConnectInfo(peer): ConnectInfo<Peer>| async move { peer.address.ip().to_string() };
        let slow = || async move {
            turns[0].notify_one();
            turns[1].notified().await;
            "done"
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (close, closing) = watch::channel(false);
        let router = Router::new().route("/who", get(who)).route("/slow", get(slow));
        let serving = tokio::spawn(serve_within(PlainListener(listener), router, closing, Places::new(), header_max));
        (address, close, serving)
    }

    /// Says this, and reads to the end of the connection.
    async fn says(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.expect("connects");
        stream.write_all(bytes).await.expect("open");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await.expect("it is ended");
        // A reset is an end, too.
        drop(read);
        String::from_utf8(answer).expect("text")
    }

    #[tokio::test]
    async fn who_says_nothing_or_half_a_header_is_hung_up_on_and_others_are_served() {
        let (address, _close, _serving) = doors(Duration::from_millis(200), Arc::default()).await;
        assert!(says(address, GET).await.ends_with("127.0.0.1"), "answered, and hung up on when nothing more came");
        let (silent, half) = tokio::join!(says(address, b""), says(address, &GET[..20]));
        assert!(!silent.contains("200") && !half.contains("200"), "{silent} {half}");
    }

    #[tokio::test]
    async fn what_is_under_way_ends_before_the_doors_close() {
        let turns: Arc<[Notify; 2]> = Arc::default();
        let (address, close, serving) = doors(Duration::from_secs(30), turns.clone()).await;
        let under_way = tokio::spawn(async move { says(address, b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await });
        let mut idle = TcpStream::connect(address).await.expect("connects");
        idle.write_all(GET).await.expect("open");
        let mut first = [0; 12];
        idle.read_exact(&mut first).await.expect("answered");
        turns[0].notified().await;
        close.send(true).expect("served");
        // The idle one is gone before the other has its answer.
        let mut rest = Vec::new();
        tokio::time::timeout(Duration::from_secs(10), idle.read_to_end(&mut rest)).await.expect("it is ended").expect("in order");
        turns[1].notify_one();
        tokio::time::timeout(Duration::from_secs(10), serving).await.expect("nothing is left to wait for").expect("no panic");
        assert!(under_way.await.expect("no panic").ends_with("done"));
        assert!(TcpStream::connect(address).await.is_err(), "nobody comes in any more");
    }
}
