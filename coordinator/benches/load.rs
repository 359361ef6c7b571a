//! Load on a running coordinator, for `scripts/bench.sh`: each verb measures one thing from the outside and prints one line of JSON.
//!
//! `load URL submit CLIENTS SECONDS` durable submissions per second · `load URL running COUNT` submit to RUNNING in ms, one at a time ·
//! `load URL finish COUNT CLIENTS` trivial jobs finished per second · `load URL tail COUNT` a line's age at an SSE reader in ms ·
//! `load URL lines COUNT` lines per second through an SSE reader, and how many were missed. Loopback only, bounded, ends by itself.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

type Fail = Box<dyn std::error::Error + Send + Sync>;

/// One kept-alive connection.
struct Connection {
    stream: BufReader<TcpStream>,
    host: String,
}

impl Connection {
    async fn open(host: &str) -> Result<Self, Fail> {
        let stream = TcpStream::connect(host).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::with_capacity(256 * 1024, stream), host: host.into() })
    }

    async fn send(&mut self, method: &str, path: &str, body: &str) -> Result<u16, Fail> {
        let kind = if body.is_empty() { "" } else { "content-type: application/json\r\n" };
        let head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n{kind}content-length: {}\r\n\r\n{body}", self.host, body.len());
        self.stream.get_mut().write_all(head.as_bytes()).await?;
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        Ok(line.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or("no status line")?)
    }

    /// Reads the headers; the body's length when it is told.
    async fn headers(&mut self) -> Result<usize, Fail> {
        let mut length = 0;
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).await?;
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                return Ok(length);
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
    }

    async fn call(&mut self, method: &str, path: &str, body: &str) -> Result<(u16, Vec<u8>), Fail> {
        let status = self.send(method, path, body).await?;
        let length = self.headers().await?;
        let mut answer = vec![0; length];
        self.stream.read_exact(&mut answer).await?;
        Ok((status, answer))
    }

    async fn submit(&mut self, body: &str) -> Result<String, Fail> {
        let (status, answer) = self.call("POST", "/jobs", body).await?;
        if status != 201 {
            return Err(format!("{status}: {}", String::from_utf8_lossy(&answer)).into());
        }
        let job: Value = serde_json::from_slice(&answer)?;
        Ok(job["job_id"].as_str().unwrap_or_default().to_string())
    }

    async fn get(&mut self, path: &str) -> Result<Value, Fail> {
        Ok(serde_json::from_slice(&self.call("GET", path, "").await?.1)?)
    }
}

fn spread(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let at = |q: f64| values.get(((values.len().max(1) - 1) as f64 * q).round() as usize).copied();
    json!({ "count": values.len(), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0) })
}

/// A job that no node takes, so that only accepting is measured.
const NEVER: &str = r#"{"command": ["true"], "resources": {"cpus": 60000}}"#;
const TRUE: &str = r#"{"command": ["true"]}"#;

async fn submit(host: &str, clients: usize, seconds: u64) -> Result<Value, Fail> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let client = || async {
        let mut connection = Connection::open(host).await?;
        let mut took = Vec::new();
        while Instant::now() < end {
            let started = Instant::now();
            connection.submit(NEVER).await?;
            took.push(started.elapsed().as_secs_f64() * 1e3);
        }
        Ok::<_, Fail>(took)
    };
    let started = Instant::now();
    let all = futures_util::future::try_join_all((0..clients).map(|_| client())).await?;
    let took: Vec<f64> = all.into_iter().flatten().collect();
    Ok(json!({ "accepted_per_second": took.len() as f64 / started.elapsed().as_secs_f64(), "latency_ms": spread(took) }))
}

/// Follows everybody's events and gives the time at which each wanted one was received.
async fn events(
    host: &str,
    wanted: &'static str,
    count: usize,
    ready: tokio::sync::oneshot::Sender<()>,
) -> Result<Vec<(String, Instant)>, Fail> {
    let mut connection = Connection::open(host).await?;
    connection.send("GET", "/events/stream", "").await?;
    connection.headers().await?;
    let mut lines = connection.stream.lines();
    let mut ready = Some(ready);
    let mut found = Vec::new();
    let mut ours = false;
    while found.len() < count {
        let Some(line) = lines.next_line().await? else { return Err("the stream of events ended".into()) };
        if let Some(ready) = ready.take() {
            let _ = ready.send(());
        }
        if let Some(name) = line.strip_prefix("event: ") {
            ours = name == wanted;
        } else if let Some(data) = line.strip_prefix("data: ").filter(|_| ours) {
            let event: Value = serde_json::from_str(data)?;
            found.push((event["job_id"].as_str().unwrap_or_default().to_string(), Instant::now()));
        }
    }
    Ok(found)
}

async fn running(host: &str, count: usize) -> Result<Value, Fail> {
    let mut took = Vec::new();
    let mut connection = Connection::open(host).await?;
    for _ in 0..count {
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let own = host.to_string();
        let seen = tokio::spawn(async move { events(&own, "job_running", 1, ready).await });
        is_ready.await?;
        let started = Instant::now();
        connection.submit(TRUE).await?;
        let found = seen.await??;
        took.push(found[0].1.duration_since(started).as_secs_f64() * 1e3);
    }
    Ok(json!({ "submit_to_running_ms": spread(took) }))
}

async fn finish(host: &str, count: usize, clients: usize) -> Result<Value, Fail> {
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let own = host.to_string();
    let finals = tokio::spawn(async move { events(&own, "job_final", count, ready).await });
    is_ready.await?;
    let started = Instant::now();
    let client = |n: usize| async move {
        let mut connection = Connection::open(host).await?;
        for _ in (n..count).step_by(clients) {
            connection.submit(TRUE).await?;
        }
        Ok::<_, Fail>(())
    };
    futures_util::future::try_join_all((0..clients).map(client)).await?;
    let submitted = started.elapsed();
    finals.await??;
    let all = started.elapsed().as_secs_f64();
    Ok(json!({ "finished_per_second": count as f64 / all, "submitted_after_s": submitted.as_secs_f64(), "finished_after_s": all }))
}

/// The log lines of a job as its SSE stream gives them out.
struct LogReader {
    connection: Connection,
}

impl LogReader {
    async fn open(host: &str, job: &str) -> Result<Self, Fail> {
        let mut connection = Connection::open(host).await?;
        connection.send("GET", &format!("/jobs/{job}/logs/stream"), "").await?;
        connection.headers().await?;
        Ok(Self { connection })
    }

    /// The next line's text, without reading the JSON around it; `None` at the end.
    async fn next<'a>(&mut self, buffer: &'a mut Vec<u8>) -> Result<Option<&'a [u8]>, Fail> {
        let mut log = false;
        loop {
            buffer.clear();
            if self.connection.stream.read_until(b'\n', buffer).await? == 0 || buffer.starts_with(b"event: end") {
                return Ok(None);
            }
            if buffer.starts_with(b"event: log") {
                log = true;
            } else if log && buffer.starts_with(b"data: ") {
                let key = b"\"line\":\"";
                let at = buffer.windows(key.len()).position(|w| w == key).ok_or("a log event without a line")? + key.len();
                let end = buffer.iter().rposition(|b| *b == b'"').ok_or("a log event without an end")?;
                return Ok(Some(&buffer[at..end.max(at)]));
            }
        }
    }
}

async fn tail(host: &str, count: usize) -> Result<Value, Fail> {
    let program = format!("import time, sys\nfor n in range({count}):\n  print(repr(time.time()), flush=True)\n  time.sleep(0.02)");
    let body = json!({ "command": ["python3", "-c", program] }).to_string();
    let job = Connection::open(host).await?.submit(&body).await?;
    let mut reader = LogReader::open(host, &job).await?;
    let (mut buffer, mut ages) = (Vec::new(), Vec::new());
    while let Some(line) = reader.next(&mut buffer).await? {
        let printed: f64 = std::str::from_utf8(line)?.parse()?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
        ages.push((now - printed) * 1e3);
    }
    // The first lines were printed before the reader was there.
    let ages = ages.split_off(ages.len().min(10));
    Ok(json!({ "line_age_ms": spread(ages) }))
}

async fn lines(host: &str, count: usize) -> Result<Value, Fail> {
    let program = format!(
        "import sys\nfor n in range({count}): sys.stdout.write('%09d some text of a usual length that a training step prints\\n' % n)"
    );
    let body = json!({ "command": ["python3", "-c", program], "env": { "PYTHONUNBUFFERED": "" } }).to_string();
    let job = Connection::open(host).await?.submit(&body).await?;
    let mut reader = LogReader::open(host, &job).await?;
    let mut buffer = Vec::new();
    let (mut seen, mut wrong, mut started) = (0u64, 0u64, None);
    while let Some(line) = reader.next(&mut buffer).await? {
        started.get_or_insert_with(Instant::now);
        let number: u64 = std::str::from_utf8(line.get(..9).unwrap_or_default())?.parse()?;
        wrong += u64::from(number != seen);
        seen += 1;
    }
    let seconds = started.map_or(0.0, |at| at.elapsed().as_secs_f64());
    let mut connection = Connection::open(host).await?;
    let state = connection.get(&format!("/jobs/{job}")).await?["state"].clone();
    Ok(
        json!({ "lines": seen, "lost": count as u64 - seen, "out_of_order": wrong, "lines_per_second": seen as f64 / seconds, "state": state }),
    )
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Fail> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let number = |n: usize, default: usize| args.get(n).map_or(Ok(default), |text| text.parse::<usize>());
    let Some(url) = args.first() else {
        // `cargo bench` and `cargo test` run this without arguments: it measures only what scripts/bench.sh starts.
        println!("0 passed, 0 failed");
        return Ok(());
    };
    let host = url.trim_start_matches("http://");
    if !host.starts_with("127.0.0.1:") && !host.starts_with("localhost:") {
        return Err("loopback only".into());
    }
    let answer = match args.get(1).map(String::as_str) {
        Some("submit") => submit(host, number(2, 32)?, number(3, 5)? as u64).await?,
        Some("running") => running(host, number(2, 50)?).await?,
        Some("finish") => finish(host, number(2, 1_000)?, number(3, 8)?).await?,
        Some("tail") => tail(host, number(2, 200)?).await?,
        Some("lines") => lines(host, number(2, 500_000)?).await?,
        other => return Err(format!("unknown: {other:?}").into()),
    };
    println!("{answer}");
    Ok(())
}
