//! Stands before the embedded broker's TLS listeners. rumqttd finishes one TLS handshake before it
//! accepts the next connection, and waits for ever, so a single device whose link dies at that
//! moment would lock out all others. Here connections are spread over several listeners, and each
//! has limited time to get through the door. The bytes are passed on as they are: certificates
//! are the broker's business.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};

/// How long a listener that can't be connected to is left alone.
const ASIDE: Duration = Duration::from_secs(1);

/// The listeners that are not busy with a handshake.
struct Doors {
    give_back: mpsc::UnboundedSender<SocketAddr>,
    free: Mutex<mpsc::UnboundedReceiver<SocketAddr>>,
    all: usize,
    patience: Duration,
}

/// Passes connections on to `doors` for as long as the process lives. `patience` is the time to
/// shake hands and be answered by the broker.
pub(super) async fn stand(listener: TcpListener, doors: &[SocketAddr], patience: Duration) {
    let (give_back, free) = mpsc::unbounded_channel();
    for door in doors {
        // The receiver is alive: it is in this function.
        let _ = give_back.send(*door);
    }
    let doors = Arc::new(Doors {
        give_back,
        free: Mutex::new(free),
        all: doors.len(),
        patience,
    });
    loop {
        match listener.accept().await {
            Ok((outside, from)) => {
                let doors = doors.clone();
                tokio::spawn(async move {
                    if let Err(error) = pass(outside, &doors).await {
                        tracing::debug!(%from, %error, "an MQTT connection ended");
                    }
                });
            }
            Err(error) => {
                // Out of file descriptors, as a rule; that passes when connections end.
                tracing::error!(%error, "no MQTT connection can be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn pass(mut outside: TcpStream, doors: &Doors) -> io::Result<()> {
    // Nothing is held for a client that does not even begin.
    let begun = tokio::time::timeout(doors.patience, outside.readable()).await;
    begun.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let (door, mut inside) = doors.open().await?;
    let entered = tokio::time::timeout(doors.patience, enter(&mut outside, &mut inside)).await;
    if !matches!(entered, Ok(Ok(()))) {
        // Ends the broker's handshake before its door is given to the next.
        drop(inside);
        doors.close(door);
        return entered.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    }
    doors.close(door);
    tokio::io::copy_bidirectional(&mut outside, &mut inside)
        .await
        .map(drop)
}

/// Passes bytes on until the broker has answered what the client said after the broker's first
/// words; by then the handshake is over, whatever the version of TLS.
async fn enter(outside: &mut TcpStream, inside: &mut TcpStream) -> io::Result<()> {
    let (mut greeted, mut replied) = (false, false);
    let (mut up, mut down) = ([0; 4096], [0; 4096]);
    loop {
        tokio::select! {
            read = outside.read(&mut up) => {
                let bytes = some(&up, read?)?;
                inside.write_all(bytes).await?;
                replied |= greeted;
            }
            read = inside.read(&mut down) => {
                let bytes = some(&down, read?)?;
                outside.write_all(bytes).await?;
                greeted = true;
                if replied {
                    return Ok(());
                }
            }
        }
    }
}

fn some(buffer: &[u8], read: usize) -> io::Result<&[u8]> {
    match read {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        read => Ok(&buffer[..read]),
    }
}

impl Doors {
    /// Waits for a free listener and connects to it, trying each once.
    async fn open(&self) -> io::Result<(SocketAddr, TcpStream)> {
        let mut failed = io::Error::from(io::ErrorKind::NotConnected);
        for _ in 0..self.all {
            let Some(door) = self.free.lock().await.recv().await else {
                break;
            };
            match TcpStream::connect(door).await {
                Ok(inside) => return Ok((door, inside)),
                Err(error) => {
                    // Set aside for a while, or it would be the only free one while the others
                    // are busy.
                    let give_back = self.give_back.clone();
                    tokio::spawn(async move {
                        tokio::time::sleep(ASIDE).await;
                        // Nobody wants it any more when the porter has gone.
                        let _ = give_back.send(door);
                    });
                    failed = error;
                }
            }
        }
        Err(failed)
    }

    fn close(&self, door: SocketAddr) {
        // The receiver lives as long as `self`.
        let _ = self.give_back.send(door);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    /// A broker that speaks only when spoken to, one connection at a time until it has replied
    /// twice.
    async fn broker(listener: TcpListener) {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut word = [0; 4];
            for _ in 0..2 {
                if stream.read_exact(&mut word).await.is_err() {
                    break;
                }
                stream.write_all(&word).await.unwrap();
            }
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await
            });
        }
    }

    #[tokio::test]
    async fn who_gets_stuck_in_the_door_is_put_out_and_the_next_comes_in() {
        let inside = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let outside = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (door, address) = (inside.local_addr().unwrap(), outside.local_addr().unwrap());
        let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let nobody = closed.local_addr().unwrap();
        drop(closed);
        tokio::spawn(broker(inside));
        tokio::spawn(async move {
            // A listener that is gone does not matter while another is there.
            stand(outside, &[nobody, door], Duration::from_millis(200)).await;
        });
        let mut stuck = TcpStream::connect(address).await.unwrap();
        stuck.write_all(b"hell").await.unwrap();
        let mut word = [0; 4];
        stuck.read_exact(&mut word).await.unwrap();
        stuck.write_all(b"o").await.unwrap();
        let mut next = TcpStream::connect(address).await.unwrap();
        for said in [b"some", b"word", b"more", b"than", b"two!"] {
            next.write_all(said).await.unwrap();
            next.read_exact(&mut word).await.unwrap();
            assert_eq!(&word, said);
        }
        assert_eq!(stuck.read(&mut word).await.unwrap_or(0), 0, "put out");
    }
}
