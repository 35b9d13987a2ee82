//! A bad network: a proxy that stalls, delays, reorders, loses and cuts. The kernel's `netem` is
//! not there on every machine that runs the tests, and this needs no rights.
//!
//! On TCP a lost packet shows as a pause until it is sent again ([`RETRANSMIT`]), which is what the
//! applications see of it; on UDP datagrams are really lost, and overtake each other. Every few
//! seconds the link is cut: TCP connections end, datagrams of a moment are lost, and some clients
//! come back from another port, as behind a router that has forgotten them.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

/// Pause that a lost TCP segment costs: Linux' smallest retransmission timeout.
const RETRANSMIT: Duration = Duration::from_millis(200);
/// Longest delay of one packet, in milliseconds.
const JITTER_MS: u64 = 15;
/// Mean time between two cuts.
const CUT_EVERY: Duration = Duration::from_secs(4);
/// How long the link is gone, in milliseconds.
const CUT_MS: std::ops::Range<u64> = 100..1500;
/// Largest datagram or piece of a stream.
const PIECE: usize = 16 * 1024;

/// What the proxy did.
#[derive(Debug, Default)]
pub struct Counters {
    /// Pieces that passed.
    pub passed: AtomicU64,
    /// Pieces that were lost, or on TCP had to be sent again.
    pub lost: AtomicU64,
    /// Times that the link was cut.
    pub cuts: AtomicU64,
}

struct Weather {
    /// Share of lost pieces, 0 to 1.
    loss: f64,
    calm: AtomicBool,
    counters: Counters,
    rng: Mutex<ChaCha8Rng>,
}

impl Weather {
    fn draw<T>(&self, draw: impl FnOnce(&mut ChaCha8Rng) -> T) -> T {
        draw(&mut self.rng.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Relaxed)
    }

    /// Whether the next piece is lost.
    fn loses(&self) -> bool {
        let lost = !self.is_calm() && self.draw(|rng| rng.random_bool(self.loss));
        let counter = if lost {
            &self.counters.lost
        } else {
            &self.counters.passed
        };
        counter.fetch_add(1, Relaxed);
        lost
    }

    fn delay(&self) -> Duration {
        if self.is_calm() {
            Duration::ZERO
        } else {
            Duration::from_millis(self.draw(|rng| rng.random_range(0..=JITTER_MS)))
        }
    }

    /// Waits until a link is cut: never in calm weather.
    async fn cut(&self) {
        loop {
            // Exponential, so that a cut has no memory of the last one.
            let uniform: f64 = self.draw(|rng| rng.random_range(f64::EPSILON..1.0));
            sleep(CUT_EVERY.mul_f64(-uniform.ln())).await;
            if !self.is_calm() {
                self.counters.cuts.fetch_add(1, Relaxed);
                return;
            }
        }
    }
}

/// A proxy in front of one address, until it is dropped.
pub struct Proxy {
    /// Where clients connect.
    pub address: SocketAddr,
    weather: Arc<Weather>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// In front of a TCP listener; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn tcp(upstream: SocketAddr, loss: f64, seed: u64) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .context("no port is free for the proxy")?;
        let (address, weather) = (listener.local_addr()?, weather(loss, seed));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, upstream, Arc::clone(&weather)));
        Ok(Self {
            address,
            weather,
            _tasks: tasks,
        })
    }

    /// In front of a UDP socket; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn udp(upstream: SocketAddr, loss: f64, seed: u64) -> Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .context("no port is free for the proxy")?;
        let (address, weather) = (socket.local_addr()?, weather(loss, seed));
        let mut tasks = JoinSet::new();
        tasks.spawn(relay(Arc::new(socket), upstream, Arc::clone(&weather)));
        Ok(Self {
            address,
            weather,
            _tasks: tasks,
        })
    }

    /// From now on everything passes.
    pub fn calm(&self) {
        self.weather.calm.store(true, Relaxed);
    }

    /// What it did so far.
    pub fn counters(&self) -> &Counters {
        &self.weather.counters
    }
}

fn weather(loss: f64, seed: u64) -> Arc<Weather> {
    Arc::new(Weather {
        loss,
        calm: AtomicBool::new(false),
        counters: Counters::default(),
        rng: Mutex::new(ChaCha8Rng::seed_from_u64(seed)),
    })
}

async fn accept(listener: TcpListener, upstream: SocketAddr, weather: Arc<Weather>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let weather = Arc::clone(&weather);
        connections.spawn(async move {
            // While nobody listens behind the proxy, the client sees its connection end.
            let Ok(server) = TcpStream::connect(upstream).await else {
                return;
            };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = server.into_split();
            tokio::select! {
                _ = pump(from_client, to_server, &weather) => {}
                _ = pump(from_server, to_client, &weather) => {}
                () = weather.cut() => {}
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn pump(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    weather: &Weather,
) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let len = from.read(&mut piece).await?;
        if len == 0 {
            // The other direction may have more to say, and ends the connection when it is done.
            to.shutdown().await?;
            return std::future::pending().await;
        }
        while weather.loses() {
            sleep(RETRANSMIT).await;
        }
        sleep(weather.delay()).await;
        to.write_all(&piece[..len]).await?;
    }
}

/// One client of a UDP proxy: the socket that the server sees.
struct Path {
    socket: Arc<UdpSocket>,
    back: tokio::task::AbortHandle,
}

async fn relay(outside: Arc<UdpSocket>, upstream: SocketAddr, weather: Arc<Weather>) {
    let mut paths: HashMap<SocketAddr, Path> = HashMap::new();
    let mut tasks = JoinSet::new();
    let mut piece = vec![0; PIECE];
    let mut dark_until = Instant::now();
    let mut cut = Box::pin(weather.cut());
    loop {
        let (len, client) = tokio::select! {
            received = outside.recv_from(&mut piece) => match received {
                Ok(received) => received,
                // A client that is gone shows as an error on the next receive.
                Err(_) => continue,
            },
            () = &mut cut => {
                let (ms, forgets) = weather.draw(|rng| (rng.random_range(CUT_MS), rng.random_bool(0.5)));
                dark_until = Instant::now() + Duration::from_millis(ms);
                if forgets {
                    for (_, path) in paths.drain() {
                        path.back.abort();
                    }
                }
                cut = Box::pin(weather.cut());
                continue;
            }
        };
        if Instant::now() < dark_until || weather.loses() {
            continue;
        }
        if let std::collections::hash_map::Entry::Vacant(entry) = paths.entry(client) {
            let Ok(socket) = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await else {
                continue;
            };
            let socket = Arc::new(socket);
            let back = tasks.spawn(back(
                Arc::clone(&socket),
                Arc::clone(&outside),
                client,
                Arc::clone(&weather),
            ));
            entry.insert(Path { socket, back });
        }
        let socket = Arc::clone(&paths[&client].socket);
        deliver(socket, upstream, piece[..len].to_vec(), weather.delay());
        while tasks.try_join_next().is_some() {}
    }
}

async fn back(
    socket: Arc<UdpSocket>,
    outside: Arc<UdpSocket>,
    client: SocketAddr,
    weather: Arc<Weather>,
) {
    let mut piece = vec![0; PIECE];
    loop {
        // An error is the server's port being closed for now.
        let Ok((len, _)) = socket.recv_from(&mut piece).await else {
            tokio::task::yield_now().await;
            continue;
        };
        if !weather.loses() {
            deliver(
                Arc::clone(&outside),
                client,
                piece[..len].to_vec(),
                weather.delay(),
            );
        }
    }
}

/// Sends a datagram after a delay, so that later ones may overtake it.
fn deliver(socket: Arc<UdpSocket>, to: SocketAddr, datagram: Vec<u8>, delay: Duration) {
    let at = Instant::now() + delay;
    tokio::spawn(async move {
        sleep_until(at).await;
        // Datagrams may be lost.
        let _ = socket.send_to(&datagram, to).await;
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn a_stream_arrives_whole_or_ends() {
        runtime().block_on(async {
            let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let proxy = Proxy::tcp(server.local_addr().unwrap(), 0.2, 1)
                .await
                .unwrap();
            proxy.calm();
            let mut client = TcpStream::connect(proxy.address).await.unwrap();
            let (mut inside, _) = server.accept().await.unwrap();
            let sent: Vec<u8> = (0..100_000u32).map(|at| at as u8).collect();
            let echo = tokio::spawn(async move {
                let mut got = Vec::new();
                inside.read_to_end(&mut got).await.unwrap();
                inside.write_all(&got).await.unwrap();
            });
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            let mut got = Vec::new();
            client.read_to_end(&mut got).await.unwrap();
            echo.await.unwrap();
            assert_eq!(got, sent);
            assert_eq!(proxy.counters().lost.load(Relaxed), 0);
        });
    }

    #[test]
    fn datagrams_are_lost_at_the_given_rate_and_none_in_calm_weather() {
        runtime().block_on(async {
            let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let proxy = Proxy::udp(server.local_addr().unwrap(), 0.2, 1)
                .await
                .unwrap();
            let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            client.connect(proxy.address).await.unwrap();
            let decided = |proxy: &Proxy| {
                let counters = proxy.counters();
                counters.lost.load(Relaxed) + counters.passed.load(Relaxed)
            };
            for number in 0..500u32 {
                client.send(&number.to_le_bytes()).await.unwrap();
                while decided(&proxy) <= u64::from(number)
                    && proxy.counters().cuts.load(Relaxed) == 0
                {
                    tokio::task::yield_now().await;
                }
            }
            let lost = proxy.counters().lost.load(Relaxed);
            assert!(
                (60..=140).contains(&lost) || proxy.counters().cuts.load(Relaxed) > 0,
                "{lost}"
            );
            proxy.calm();
            client.send(b"last").await.unwrap();
            let mut piece = [0; 16];
            loop {
                let (len, _) = server.recv_from(&mut piece).await.unwrap();
                if &piece[..len] == b"last" {
                    break;
                }
            }
        });
    }
}
