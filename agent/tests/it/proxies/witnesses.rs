//! Clients of a proxy that count, and say what they have seen.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use redis::{AsyncCommands as _, AsyncConnectionConfig, aio::MultiplexedConnection};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::controller::WAIT;

const COUNTING: usize = 8;
const IDLE: usize = 20;
/// They are there to be seen, not to load the machine.
const BETWEEN: Duration = Duration::from_millis(1);

/// Clients that stay connected; none of them connects anew.
#[derive(Debug)]
pub(crate) struct Witnesses {
    stop: Arc<AtomicBool>,
    counting: Vec<JoinHandle<u64>>,
    idle: Vec<TcpStream>,
}

impl Witnesses {
    pub(crate) async fn connect(address: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut counting = vec![];
        for n in 0..COUNTING {
            let client = redis::Client::open(format!("redis://{address}/")).unwrap();
            // Late is not lost.
            let config = AsyncConnectionConfig::new().set_response_timeout(Some(WAIT));
            let connection = client.get_multiplexed_async_connection_with_config(&config);
            let connection = connection.await.unwrap();
            counting.push(tokio::spawn(count(connection, n, stop.clone())));
        }
        let mut idle = vec![];
        for _ in 0..IDLE {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        Self {
            stop,
            counting,
            idle,
        }
    }

    /// None has heard an error, lost or repeated a count, or is another client than before. The counts
    /// of all.
    pub(crate) async fn testify(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let mut counts = 0;
        for task in self.counting {
            let counted = timeout(WAIT, task).await.expect("a client to be answered");
            counts += counted.unwrap();
        }
        for mut client in self.idle {
            client.write_all(b"PING\r\n").await.unwrap();
            let mut reply = [0; 7];
            let answered = timeout(WAIT, client.read_exact(&mut reply)).await;
            answered.expect("a client to be answered").unwrap();
            assert_eq!(&reply, b"+PONG\r\n");
        }
        counts
    }
}

async fn count(mut connection: MultiplexedConnection, n: usize, stop: Arc<AtomicBool>) -> u64 {
    let id = async |connection: &mut MultiplexedConnection| -> u64 {
        let asked = redis::cmd("CLIENT").arg("ID").query_async(connection).await;
        asked.unwrap()
    };
    let key = format!("counted-{n}");
    let () = connection.del(&key).await.unwrap();
    let first = id(&mut connection).await;
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let counted: u64 = connection.incr(&key, 1).await.unwrap();
        count += 1;
        assert_eq!(counted, count, "a command was lost or came twice");
        sleep(BETWEEN).await;
    }
    assert_eq!(id(&mut connection).await, first, "it is another client");
    count
}
