//! A port that answers `GET /metrics` and nothing else: a few lines of HTTP/1.1 on a listener,
//! since a web framework would double the agent for one page.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::expose::{self, About};
use crate::shared::Shared;

/// Longest request head that is read.
const MAX_HEAD: usize = 8 << 10;
/// Longest time that one request may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Requests answered at a time.
const AT_A_TIME: usize = 4;

/// Answers requests until it is dropped.
pub async fn serve(listener: TcpListener, shared: Arc<Shared>, about: About) {
    let about = Arc::new(about);
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    loop {
        // It is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (shared, about) = (Arc::clone(&shared), Arc::clone(&about));
                tokio::spawn(async move {
                    let answered = tokio::time::timeout(PATIENCE, answer(stream, &shared, &about));
                    if let Ok(Err(error)) = answered.await {
                        tracing::debug!(%error, "a request for metrics broke off");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely; trying at once would not help.
                tracing::warn!(%error, "the metrics port accepts no connection");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, shared: &Shared, about: &About) -> io::Result<()> {
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let len = stream.read(&mut piece).await?;
        if len == 0 {
            return Ok(());
        }
        head.extend_from_slice(&piece[..len]);
        if head.len() > MAX_HEAD {
            break;
        }
    }
    let (status, body) = match route(&head) {
        Ok(()) => ("200 OK", expose::text(shared, about)),
        Err(status) => (status, format!("{status}\n")),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// Whether a request head asks for the metrics; the status of the refusal if not.
fn route(head: &[u8]) -> Result<(), &'static str> {
    if head.len() > MAX_HEAD {
        return Err("431 Request Header Fields Too Large");
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target) = (words.next(), words.next().unwrap_or_default());
    let path = target
        .split(|byte| *byte == b'?')
        .next()
        .unwrap_or_default();
    match (method, path) {
        (Some(b"GET"), b"/metrics") => Ok(()),
        (Some(b"GET"), _) => Err("404 Not Found"),
        _ => Err("405 Method Not Allowed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_metrics_are_served() {
        assert_eq!(route(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"), Ok(()));
        assert_eq!(route(b"GET /metrics?x=1 HTTP/1.0\r\n\r\n"), Ok(()));
        assert_eq!(route(b"GET / HTTP/1.1\r\n\r\n"), Err("404 Not Found"));
        assert_eq!(
            route(b"POST /metrics HTTP/1.1\r\n\r\n"),
            Err("405 Method Not Allowed")
        );
        assert_eq!(route(b"\r\n\r\n"), Err("405 Method Not Allowed"));
        assert!(route(&[b'a'; MAX_HEAD + 1]).unwrap_err().starts_with("431"));
    }
}
