//! One page by HTTP. Whoever can connect may read it, so nobody can make it cost much: few clients at
//! once, short requests, little time, and a page that is made at most a few times a second.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Mutex, Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::Snapshot;
use crate::{clock, core::Time};

const CLIENTS_MAX: usize = 8;
/// Of a request with its headers. Nothing of it but its first line matters.
const REQUEST_MAX: usize = 8 << 10;
/// From the first byte of the question to the last one of the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A page is good for this long.
const FRESH: Duration = Duration::from_millis(250);

/// The loop answers it with what it knows.
pub type MetricsRequest = oneshot::Sender<Snapshot>;

#[derive(Debug)]
pub struct MetricsServer {
    listener: TcpListener,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    page: Mutex<Option<(Time, Arc<str>)>>,
    refused: AtomicU64,
}

impl MetricsServer {
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        Ok(Self {
            listener: TcpListener::bind(address).await?,
            shared: Arc::default(),
        })
    }

    /// Serves until `requests` is closed.
    pub async fn run(self, requests: mpsc::Sender<MetricsRequest>) {
        let places = Arc::new(Semaphore::new(CLIENTS_MAX));
        loop {
            let accepted = tokio::select! {
                () = requests.closed() => return,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, mostly: clients leave, and then there is one.
                    warn!(%error, "metrics client not accepted");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                self.shared.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let (requests, shared) = (requests.clone(), Arc::clone(&self.shared));
            tokio::spawn(async move {
                let _place = place;
                match timeout(PATIENCE, serve(stream, &shared, &requests)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!(%error, "metrics client left"),
                    Err(_) => debug!("metrics client took too long"),
                }
            });
        }
    }
}

async fn serve(
    mut stream: TcpStream,
    shared: &Shared,
    requests: &mpsc::Sender<MetricsRequest>,
) -> io::Result<()> {
    let request = read_request(&mut stream).await?;
    let (status, body) = match asked(&request) {
        Ok(_) => match shared.page(requests).await {
            Some(page) => ("200 OK", page),
            None => (
                "503 Service Unavailable",
                "the agent is busy or stopping\n".into(),
            ),
        },
        Err(status) => (status, format!("{status}: GET /metrics\n").into()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    if asked(&request) != Ok(Method::Head) {
        stream.write_all(body.as_bytes()).await?;
    }
    stream.shutdown().await
}

/// Up to the empty line that ends the headers, or as much as is taken.
async fn read_request(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    while request.len() < REQUEST_MAX && !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let read = stream.read(&mut chunk).await?;
        if read == 0 {
            break;
        }
        request.extend_from_slice(chunk.get(..read).unwrap_or_default());
    }
    Ok(request)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Get,
    Head,
}

/// What the first line asks for (RFC 9112 section 3), or the status that says what is wrong with it.
fn asked(request: &[u8]) -> Result<Method, &'static str> {
    const BAD: &str = "400 Bad Request";
    if !request.windows(4).any(|end| end == b"\r\n\r\n") {
        return Err(if request.len() < REQUEST_MAX {
            BAD
        } else {
            "431 Request Header Fields Too Large"
        });
    }
    let line = request
        .split(|byte| *byte == b'\r')
        .next()
        .unwrap_or(request);
    let line = std::str::from_utf8(line).map_err(|_| BAD)?;
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(BAD);
    };
    if !version.starts_with("HTTP/1.") {
        return Err(BAD);
    }
    let method = match method {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        _ => return Err("405 Method Not Allowed"),
    };
    match target.split('?').next() {
        Some("/metrics") => Ok(method),
        _ => Err("404 Not Found"),
    }
}

impl Shared {
    /// Whoever comes while a page is made waits for that one.
    async fn page(&self, requests: &mpsc::Sender<MetricsRequest>) -> Option<Arc<str>> {
        let mut page = self.page.lock().await;
        let now = clock::monotonic();
        if let Some((at, text)) = page.as_ref()
            && now.since(*at) < FRESH
        {
            return Some(Arc::clone(text));
        }
        let (reply, answer) = oneshot::channel();
        requests.send(reply).await.ok()?;
        let mut snapshot = answer.await.ok()?;
        snapshot.clients_refused = self.refused.load(Ordering::Relaxed);
        let text: Arc<str> = snapshot.text().ok()?.into();
        *page = Some((now, Arc::clone(&text)));
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::{super::tests::snapshot, *};

    /// Runs a server whose loop counts how often it is asked; `test` talks to it from a thread.
    fn with_server(test: impl FnOnce(SocketAddr) + Send + 'static) -> (u64, Arc<Shared>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let server = MetricsServer::bind(([127, 0, 0, 1], 0).into())
                .await
                .unwrap();
            let address = server.listener.local_addr().unwrap();
            let shared = Arc::clone(&server.shared);
            let (sender, mut requests) = mpsc::channel(1);
            let serving = tokio::spawn(server.run(sender));
            let mut talk = tokio::task::spawn_blocking(move || test(address));
            let mut asked = 0;
            loop {
                tokio::select! {
                    done = &mut talk => break done.unwrap(),
                    Some(reply) = requests.recv() => {
                        asked += 1;
                        let reply: MetricsRequest = reply;
                        let _gone = reply.send(snapshot());
                    }
                }
            }
            drop(requests);
            serving.await.unwrap();
            (asked, shared)
        })
    }

    fn say(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(request).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn serves_the_page_and_nothing_else() {
        let (asked, _) = with_server(|address| {
            let page = say(address, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
            assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
            let (head, body) = page.split_once("\r\n\r\n").unwrap();
            assert!(
                head.contains(&format!("Content-Length: {}\r\n", body.len())),
                "{head}"
            );
            assert!(body.contains("dhcp_reclaim_bindings{"), "{body}");
            let head = say(address, b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n");
            assert!(
                head.contains("200 OK") && head.ends_with("\r\n\r\n"),
                "{head}"
            );
            for (request, status) in [
                (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
                (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
                (b"GET /metrics HTTP/2\r\n\r\n", "400"),
                (b"GET  /metrics HTTP/1.1\r\n\r\n", "400"),
                (b"\xff\xfe \r\n\r\n", "400"),
            ] {
                let answer = say(address, request);
                assert!(
                    answer.starts_with(&format!("HTTP/1.1 {status}")),
                    "{answer}"
                );
            }
        });
        assert!(asked >= 1);
    }

    #[test]
    fn many_scrapes_are_few_questions_to_the_loop() {
        let (asked, _) = with_server(|address| {
            for _ in 0..100 {
                let page = say(address, b"GET /metrics HTTP/1.1\r\n\r\n");
                assert!(page.starts_with("HTTP/1.1 200"), "{page}");
            }
        });
        assert!(asked < 50, "{asked}");
    }

    #[test]
    fn slow_and_talkative_clients_are_few_and_bounded() {
        let (_, shared) = with_server(|address| {
            // Headers without an end.
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            let mut request = b"GET /metrics HTTP/1.1\r\n".to_vec();
            request.extend(std::iter::repeat_n(b'a', REQUEST_MAX));
            let _some = stream.write_all(&request);
            let mut answer = Vec::new();
            let _reset = stream.read_to_end(&mut answer);
            let answer = String::from_utf8_lossy(&answer).into_owned();
            assert!(
                answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
                "{answer}"
            );
            // Those that say nothing hold no more than their places, and are turned out.
            let silent: Vec<_> = (0..CLIENTS_MAX)
                .map(|_| std::net::TcpStream::connect(address).unwrap())
                .collect();
            let mut one_more = std::net::TcpStream::connect(address).unwrap();
            let mut byte = [0];
            assert!(
                !matches!(one_more.read(&mut byte), Ok(1..)),
                "it was not turned away"
            );
            for mut stream in silent {
                // Each ends by the server's patience.
                assert!(!matches!(stream.read(&mut byte), Ok(1..)));
            }
            let page = say(address, b"GET /metrics HTTP/1.1\r\n\r\n");
            assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        });
        assert_eq!(shared.refused.load(Ordering::Relaxed), 1);
    }
}
