//! Two proxies and what passes between them.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message as _;
use slotmesh_proto::handover::v1 as pb;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::node::{Node, snapshot};
use super::raw::http_get;
use super::{LIMIT, Proxy};

/// Where the process that serves is asked to hand over.
pub(crate) fn door(data: &Path) -> PathBuf {
    let text = std::fs::read_to_string(data.join("proxy.json")).unwrap();
    let known: serde_json::Value = serde_json::from_str(&text).unwrap();
    PathBuf::from(known["handover"].as_str().unwrap())
}

/// What the process that takes over has said of it last.
pub(crate) fn take_over_report(data: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(data.join("take-over.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Two shards of one node each, and where they are for a proxy with this directory.
pub(crate) fn mesh(data: &Path) -> Vec<Node> {
    let nodes: Vec<Node> = (0..2).map(|_| Node::start_with_epoch(1)).collect();
    let routes = (0..2).map(|i| nodes[i as usize].route(i, 2, 1)).collect();
    slotmesh_proxy::saved::save(data, &snapshot(1, routes)).unwrap();
    nodes
}

/// A second proxy that takes over from the one that serves.
pub(crate) async fn successor(data: &Path, workers: u32) -> Proxy {
    successor_with(data, workers, &[]).await
}

/// As [`successor`]; it is told more.
pub(crate) async fn successor_with(data: &Path, workers: u32, flags: &[&str]) -> Proxy {
    let door = door(data);
    let (door, workers) = (door.to_str().unwrap(), workers.to_string());
    let own = ["--workers", &workers, "--take-over", door];
    Proxy::start(data, &[&own, flags].concat()).await
}

/// A number of the admin port.
pub(crate) async fn metric(admin: SocketAddr, name: &str) -> u64 {
    let text = http_get(admin, "/metrics").await;
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("slotmesh_proxy_{name}")));
    let value = line.and_then(|line| line.split(' ').next_back());
    let value = value.unwrap_or_else(|| panic!("no {name} in {text}"));
    value.parse::<f64>().unwrap() as u64
}

pub(crate) async fn wait_metric(admin: SocketAddr, name: &str, want: u64) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        let now = metric(admin, name).await;
        if now == want {
            return;
        }
        let late = tokio::time::Instant::now() > deadline;
        assert!(!late, "waited for {name} to be {want}, it is {now}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A client that keeps a pipe full of INCR and checks that every reply comes once, in order.
pub(crate) async fn count(
    address: SocketAddr,
    key: String,
    stop: tokio_util::sync::CancellationToken,
) -> u64 {
    const DEPTH: u64 = 24;
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let one = format!("*2\r\n$4\r\nINCR\r\n${}\r\n{key}\r\n", key.len());
    let (mut sent, mut heard, mut input) = (0, 0, Vec::new());
    loop {
        if !stop.is_cancelled() {
            let more = DEPTH - (sent - heard);
            let frames = one.repeat(more as usize);
            stream.write_all(frames.as_bytes()).await.unwrap();
            sent += more;
        } else if sent == heard {
            return heard;
        }
        let read = tokio::time::timeout(LIMIT, stream.read_buf(&mut input)).await;
        let count = read.unwrap_or_else(|_| panic!("{key}: waited for reply {heard}"));
        assert!(count.unwrap() > 0, "{key}: closed after {heard} replies");
        while let Some(end) = input.windows(2).position(|two| two == b"\r\n") {
            let line: Vec<u8> = input.drain(..end + 2).collect();
            heard += 1;
            assert_eq!(
                String::from_utf8_lossy(&line),
                format!(":{heard}\r\n"),
                "{key}"
            );
        }
    }
}

/// A conversation by hand, without the descriptors.
pub(crate) struct Peer(std::os::unix::net::UnixStream);

impl Peer {
    pub(crate) fn connect(door: &Path) -> Self {
        let stream = std::os::unix::net::UnixStream::connect(door).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    pub(crate) fn say(&mut self, message: pb::to_giver::Message) {
        let message = pb::ToGiver {
            message: Some(message),
        };
        let body = message.encode_to_vec();
        let len = (body.len() as u32).to_be_bytes();
        self.0.write_all(&[&len[..], &body].concat()).unwrap();
    }

    pub(crate) fn ask(&mut self, version: u32, proxy_id: &str) {
        self.ask_with(version, proxy_id, 3);
    }

    pub(crate) fn ask_with(&mut self, version: u32, proxy_id: &str, schema_max: u32) {
        self.say(pb::to_giver::Message::Ask(pb::Ask {
            version_min: version,
            version_max: version,
            schema_max,
            proxy_id: proxy_id.to_owned(),
            instance_id: "i1".to_owned(),
            release: "0.0.0-test".to_owned(),
            pid: std::process::id(),
            door: "/nowhere".to_owned(),
            revision: 0,
        }));
    }

    pub(crate) fn adopt(&mut self, number: u64, refused: Vec<u32>) {
        self.say(pb::to_giver::Message::Adopted(pb::Adopted {
            number,
            refused,
        }));
    }

    /// `None`: the other side has ended the conversation.
    pub(crate) fn hear(&mut self) -> Option<pb::to_taker::Message> {
        let mut len = [0; 4];
        self.0.read_exact(&mut len).ok()?;
        let mut body = vec![0; u32::from_be_bytes(len) as usize];
        self.0.read_exact(&mut body).ok()?;
        pb::ToTaker::decode(&body[..]).unwrap().message
    }
}

/// Asks a spare to serve again; its answer.
pub(crate) async fn take_back(door: PathBuf) -> String {
    let asked = tokio::task::spawn_blocking(move || {
        let mut peer = Peer::connect(&door);
        peer.say(pb::to_giver::Message::TakeBack(pb::TakeBack {}));
        match peer.hear() {
            Some(pb::to_taker::Message::TakenBack(answer)) => answer.problem,
            other => panic!("{other:?}"),
        }
    });
    asked.await.unwrap()
}

/// A proxy in a process of its own. Ended at once when dropped.
pub(crate) struct Process {
    child: std::process::Child,
    pub(crate) log: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Process {
    /// Takes over from the one whose door it is told.
    pub(crate) fn start(data: &Path, take_over: Option<&Path>) -> Self {
        Self::start_by(
            std::process::Command::new(env!("CARGO_BIN_EXE_slotmesh-proxy")),
            data,
            take_over,
        )
    }

    /// As [`Process::start`]; it may open so many files and sockets.
    pub(crate) fn start_with_files(data: &Path, take_over: Option<&Path>, files: u32) -> Self {
        let mut shell = std::process::Command::new("sh");
        shell
            .arg("-c")
            .arg(format!("ulimit -n {files}; exec \"$0\" \"$@\""))
            .arg(env!("CARGO_BIN_EXE_slotmesh-proxy"));
        Self::start_by(shell, data, take_over)
    }

    fn start_by(mut command: std::process::Command, data: &Path, take_over: Option<&Path>) -> Self {
        static STARTED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = STARTED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let log = data.join(format!("log.{number}"));
        let file = std::fs::File::create(&log).unwrap();
        command
            .args(["--proxy-id", "p1", "--instance", "i1", "--workers", "2"])
            .arg("--data")
            .arg(data)
            .stdout(file.try_clone().unwrap())
            .stderr(file);
        if let Some(door) = take_over {
            command.arg("--take-over").arg(door);
        }
        Self {
            child: command.spawn().unwrap(),
            log,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its exit code, once it has ended by itself.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        let child = &mut self.child;
        let ended = super::wait_for("the end of a proxy", || child.try_wait().unwrap()).await;
        ended.code()
    }

    /// Waits until it is the one that serves; its address and that of its metrics.
    pub(crate) async fn serves(&self, data: &Path) -> (SocketAddr, SocketAddr) {
        let what = format!("{} to serve; its log: {}", self.pid(), self.log.display());
        super::wait_for(&what, || known(data).filter(|known| known.0 == self.pid()))
            .await
            .1
    }
}

/// Pid of the process that serves, its address and that of its metrics.
fn known(data: &Path) -> Option<(u32, (SocketAddr, SocketAddr))> {
    let text = std::fs::read_to_string(data.join("proxy.json")).ok()?;
    let known: serde_json::Value = serde_json::from_str(&text).ok()?;
    let address = |name: &str| known[name].as_str()?.parse().ok();
    let pid = known["pid"].as_u64()? as u32;
    Some((pid, (address("address")?, address("admin_address")?)))
}

pub(crate) fn serving_pid(data: &Path) -> Option<u32> {
    known(data).map(|known| known.0)
}
