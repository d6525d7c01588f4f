//! A replica whose primary has not begun to send: a relay between two real engines keeps the replica's
//! acknowledgments back, as a primary loses them that has not noticed the end of a full copy.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use slotmesh_agent::probe::Info;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

use crate::{
    controller::is_running,
    failover::{keys_of, write},
    hosts::{Mesh, eventually, fetched_engines},
};

/// A replica's own clock acknowledges at once and then every second: at least 5 s for so many.
const ACKS: usize = 6;
const OWN_CLOCK: Duration = Duration::from_secs(4);

/// Passes everything on, but what a replica says after its PSYNC only once it is let go.
struct Relay {
    address: SocketAddr,
    is_open: watch::Sender<bool>,
    kept_back: Arc<Mutex<Vec<u8>>>,
}

impl Relay {
    async fn start(to: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let relay = Self {
            address: listener.local_addr().unwrap(),
            is_open: watch::Sender::new(false),
            kept_back: Arc::default(),
        };
        let (is_open, kept_back) = (relay.is_open.subscribe(), relay.kept_back.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&to).await else {
                    continue;
                };
                let (mut answers, requests) = server.into_split();
                let (from, mut back) = client.into_split();
                tokio::spawn(async move { copy(&mut answers, &mut back).await });
                tokio::spawn(pass(from, requests, is_open.clone(), kept_back.clone()));
            }
        });
        relay
    }

    fn acks(&self) -> usize {
        let kept = self.kept_back.lock().unwrap();
        kept.windows(5).filter(|w| w == b"\r\nACK").count()
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut is_open: watch::Receiver<bool>,
    kept_back: Arc<Mutex<Vec<u8>>>,
) -> Option<()> {
    let mut chunk = [0; 4096];
    let mut is_fed = false;
    loop {
        let count = tokio::select! {
            count = from.read(&mut chunk) => count.ok().filter(|n| *n > 0)?,
            Ok(_) = is_open.wait_for(|open| *open && is_fed) => break,
        };
        if is_fed {
            kept_back.lock().unwrap().extend_from_slice(&chunk[..count]);
            continue;
        }
        to.write_all(&chunk[..count]).await.ok()?;
        is_fed = chunk[..count].windows(5).any(|w| w == b"PSYNC");
    }
    copy(&mut from, &mut to).await.ok()?;
    Some(())
}

/// `a` is the primary of `b`, which reaches it through the relay.
async fn provisioned(engine: &str) -> (Mesh, Relay) {
    let mesh = Mesh::start(engine).await;
    let controller = mesh.controller.clone();
    let a = controller.until("running", 0, is_running).await;
    let b = controller.until("running", 1, is_running).await;
    let relay = Relay::start(a.address).await;
    controller.change(|record| {
        record.epoch = 1;
        record.run_ids = [a.run_id, b.run_id];
        record.addresses = [relay.address.to_string(), b.address];
    });
    controller.until("grant", 0, |n| n.granted_epoch == 1).await;
    (mesh, relay)
}

/// Whether the engine waits for an acknowledgment at all before it begins to send.
async fn a_link_over_which_nothing_comes_is_not_up_in(engine: &str) -> bool {
    let (mesh, relay) = provisioned(engine).await;
    let controller = mesh.controller.clone();
    let mut b = mesh.admin(1).await;
    eventually("the replica to call its link up", async || {
        let info = Info::read(&mut b, "replication").await.unwrap();
        info.text("master_link_status") == "up"
    })
    .await;
    let since = Instant::now();
    let mut writer = mesh.proxy_connection().await;
    write(&mut writer, 0..50).await;

    let is_up = || controller.node(1).is_some_and(|n| n.link_up);
    eventually("acknowledgments", async || relay.acks() >= ACKS || is_up()).await;
    let waits = keys_of(&mesh, 1).await == 0;
    if waits {
        // Asked for at each look, so that they come far sooner than by the replica's own clock.
        assert!(
            since.elapsed() < OWN_CLOCK,
            "{:?} {engine}",
            since.elapsed()
        );
        assert!(!is_up(), "nothing was sent by {engine}");
        relay.is_open.send_replace(true);
    }
    controller.until("link up", 1, |n| n.link_up).await;
    eventually("b to have it all", async || keys_of(&mesh, 1).await == 50).await;
    waits
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_over_which_nothing_comes_after_a_full_copy_is_not_up() {
    assert!(
        a_link_over_which_nothing_comes_is_not_up_in("").await,
        "the default engine waits for acknowledgments"
    );
    for engine in fetched_engines() {
        // Redis 8 begins by itself.
        a_link_over_which_nothing_comes_is_not_up_in(&engine).await;
    }
}
