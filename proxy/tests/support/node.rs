//! A real redis-server whose default user is off, as agents start them.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use slotmesh_proto::topology::v1 as pb;

use super::LIMIT;

pub(crate) const ADMIN: &str = "admin-of-the-test";
pub(crate) const SECRET: &str = "secret-of-the-epoch";
pub(crate) const OBSERVER: &str = "secret-of-the-observer";
/// As agents give them: it listens and asks, and sees no key.
const OBSERVER_RIGHTS: &[&str] = &[
    "resetkeys",
    "&*",
    "-@all",
    "+subscribe",
    "+psubscribe",
    "+ssubscribe",
    "+unsubscribe",
    "+punsubscribe",
    "+sunsubscribe",
    "+ping",
    "+monitor",
    "+info",
    "+select",
    "+auth",
    "+hello",
    "+client|tracking",
    "+client|caching",
    "+client|id",
    "+client|setname",
];

pub(crate) struct Node {
    process: Child,
    pub(crate) address: SocketAddr,
    program: PathBuf,
    extra: Vec<String>,
    dir: tempfile::TempDir,
}

/// An engine beside the one that is installed, if it has been fetched.
pub(crate) fn engine(name: &str) -> Option<PathBuf> {
    let engines = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.engines");
    let program = engines.join(name).join("redis-server");
    program.exists().then_some(program)
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Node {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// With more arguments for the redis-server.
    pub(crate) fn start_with(extra: &[&str]) -> Self {
        // The listener is gone before the node starts, or the port would be taken.
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        Self::launch(free, extra)
    }

    /// Another engine, with more arguments for it.
    pub(crate) fn start_engine(program: &Path, extra: &[&str]) -> Self {
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        Self::launch_in(dir, program, free, extra)
    }

    pub(crate) fn start_at(address: SocketAddr) -> Self {
        Self::launch(address, &[])
    }

    /// Ends the process at once and starts it again on what it has left on its disk.
    pub(crate) fn start_again(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        self.process = spawn(&self.program, self.dir.path(), self.address, &self.extra);
        self.wait_answer();
    }

    fn launch(address: SocketAddr, extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::launch_in(dir, Path::new("redis-server"), address, extra)
    }

    fn launch_in(
        dir: tempfile::TempDir,
        program: &Path,
        address: SocketAddr,
        extra: &[&str],
    ) -> Self {
        let extra: Vec<String> = extra.iter().map(|&word| word.to_owned()).collect();
        let node = Self {
            process: spawn(program, dir.path(), address, &extra),
            address,
            program: program.to_owned(),
            extra,
            dir,
        };
        node.wait_answer();
        node
    }

    fn wait_answer(&self) {
        let address = self.address;
        wait(&format!("redis-server at {address}"), || is_redis(address));
    }

    /// With the user of an epoch, as after a grant.
    pub(crate) fn start_with_epoch(epoch: u64) -> Self {
        let node = Self::start();
        node.grant(epoch);
        node
    }

    pub(crate) fn grant(&self, epoch: u64) {
        let (user, secret) = (format!("px-{epoch}"), format!(">{SECRET}"));
        let rights = [
            "+@all",
            "-@admin",
            "-@dangerous",
            "+keys",
            "+flushall",
            "+flushdb",
            "+swapdb",
            "+restore",
            "+info",
            "+debug",
            "+config|get",
            "+config|resetstat",
            "+slowlog",
            "+latency",
            "+sort",
            "+client|unblock",
            "+client|id",
        ];
        let fixed = ["ACL", "SETUSER", &user, "reset", "on", &secret, "~*", "&*"];
        let words: Vec<&str> = fixed.into_iter().chain(rights).collect();
        assert_eq!(self.admin(&words), "+OK\r\n");
    }

    /// As agents fence: what is refused was not executed.
    pub(crate) fn fence(&self, epoch: u64) {
        let user = format!("px-{epoch}");
        let words = ["ACL", "SETUSER", &user, "-@all", "+@read", "+@connection"];
        assert_eq!(self.admin(&words), "+OK\r\n");
    }

    pub(crate) fn unfence(&self, epoch: u64) {
        let user = format!("px-{epoch}");
        let words = ["ACL", "SETUSER", &user, "+@all", "-@admin", "-@dangerous"];
        assert_eq!(self.admin(&words), "+OK\r\n");
    }

    /// One command as the administrator; its raw reply, if it is not longer than one read.
    pub(crate) fn admin(&self, words: &[&str]) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        for words in [&["AUTH", "admin", ADMIN][..], words] {
            let words: Vec<&[u8]> = words.iter().map(|w| w.as_bytes()).collect();
            let mut frame = Vec::new();
            slotmesh_resp::write::encode_command(&mut frame, &words);
            stream.write_all(&frame).unwrap();
            let mut reply = vec![0; 64 * 1024];
            let count = stream.read(&mut reply).unwrap();
            reply.truncate(count);
            if words[0] != b"AUTH" {
                return String::from_utf8_lossy(&reply).into_owned();
            }
            assert_eq!(reply, b"+OK\r\n");
        }
        unreachable!("the second command returns")
    }

    pub(crate) fn replicate(&self, primary: &Self) {
        let port = primary.address.port().to_string();
        assert_eq!(self.admin(&["REPLICAOF", "127.0.0.1", &port]), "+OK\r\n");
        self.wait_info("master_link_status:up");
    }

    /// Makes this replica acknowledge at once what it has received, until it is a primary. By itself
    /// it does so once a second, and a `FAILOVER` waits for it.
    pub(crate) fn acknowledge_until_primary(&self) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream
            .write_all(format!("AUTH admin {ADMIN}\r\n").as_bytes())
            .unwrap();
        wait("the replica to become primary", || {
            stream.write_all(b"REPLCONF GETACK *\r\n").unwrap();
            self.admin(&["INFO", "replication"]).contains("role:master")
        });
    }

    /// Stops the process where it is; its connections stay open.
    pub(crate) fn freeze(&self) {
        self.signal("STOP");
    }

    pub(crate) fn thaw(&self) {
        self.signal("CONT");
    }

    /// Ends the process at once.
    pub(crate) fn kill(&self) {
        self.signal("KILL");
    }

    fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(sent.unwrap().success(), "kill -s {name}");
    }

    /// Waits until so many clients wait at this node for something.
    pub(crate) async fn wait_blocked(&self, clients: usize) {
        let text = format!("blocked_clients:{clients}\r");
        super::wait_for(&text, || {
            let info = self.admin(&["INFO", "clients"]);
            info.contains(&text).then_some(())
        })
        .await;
    }

    /// Waits until somebody listens to a channel at this node.
    pub(crate) async fn wait_subscriber(&self, channel: &str) {
        super::wait_for("a subscriber", || {
            let count = self.admin(&["PUBSUB", "NUMSUB", channel]);
            count.ends_with(":1\r\n").then_some(())
        })
        .await;
    }

    /// Waits until this replica has all that its primary has.
    pub(crate) fn wait_offset(&self, primary: &Self) {
        let offset = |node: &Self| {
            let info = node.admin(&["INFO", "replication"]);
            let mut lines = info.lines();
            let line = lines.find_map(|l| l.strip_prefix("master_repl_offset:"));
            line.unwrap_or_default().to_owned()
        };
        wait("the replica's offset", || offset(self) == offset(primary));
    }

    /// Waits until this replica follows its primary.
    pub(crate) async fn wait_link(&self) {
        super::wait_for("the replica's link", || {
            let info = self.admin(&["INFO", "replication"]);
            info.contains("master_link_status:up").then_some(())
        })
        .await;
    }

    pub(crate) fn wait_info(&self, text: &str) {
        wait(text, || self.admin(&["INFO", "replication"]).contains(text));
    }

    /// Its route as the primary of one of `shards` equal shards.
    pub(crate) fn route(&self, index: u32, shards: u32, epoch: u64) -> pb::ShardRoute {
        let range = pb::SlotRange {
            first: 16384 * index / shards,
            last: 16384 * (index + 1) / shards - 1,
        };
        pb::ShardRoute {
            shard_id: format!("s{index}"),
            index,
            slots: vec![range],
            epoch,
            primary_node_id: format!("n{index}"),
            primary_address: self.address.to_string(),
            username: format!("px-{epoch}"),
            password: SECRET.to_owned(),
            observer_username: "observer".to_owned(),
            observer_password: OBSERVER.to_owned(),
            ..Default::default()
        }
    }
}

fn spawn(program: &Path, dir: &Path, address: SocketAddr, extra: &[String]) -> Child {
    let port = address.port().to_string();
    // Redis 6 knows neither the option nor channels of shards.
    let is_6 = program
        .components()
        .any(|part| part.as_os_str() == "redis-6.2");
    let debug: &[&str] = match is_6 {
        true => &[],
        false => &["--enable-debug-command", "yes"],
    };
    let rights = OBSERVER_RIGHTS.iter();
    let rights =
        rights.filter(|right| !is_6 || !matches!(**right, "+ssubscribe" | "+sunsubscribe"));
    Command::new(program)
        .args([
            "--port",
            &port,
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--databases",
            "256",
        ])
        .args(debug)
        .args(["--repl-diskless-sync-delay", "0", "--appendonly", "no"])
        .args(["--user", "default", "off"])
        .args([
            "--user",
            "admin",
            "on",
            &format!(">{ADMIN}"),
            "~*",
            "&*",
            "+@all",
        ])
        .args(["--user", "observer", "on", &format!(">{OBSERVER}")])
        .args(rights)
        .args(["--masteruser", "admin", "--masterauth", ADMIN])
        .args(["--dir", dir.to_str().unwrap()])
        .args(extra)
        .stdout(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

fn wait(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !ready() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A connection alone proves nothing: on loopback a port may be connected to itself.
fn is_redis(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return false;
    };
    if stream.local_addr().ok() == stream.peer_addr().ok() {
        return false;
    }
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let mut reply = [0; 7];
    let answered = stream.write_all(b"PING\r\n").is_ok() && stream.read_exact(&mut reply).is_ok();
    answered && &reply == b"-NOAUTH"
}

/// A snapshot of these routes, as the proxy saves it.
pub(crate) fn snapshot(revision: u64, shards: Vec<pb::ShardRoute>) -> pb::Snapshot {
    let settings = pb::InstanceSettings {
        instance_id: "i1".to_owned(),
        architecture: pb::Architecture::Cluster.into(),
        databases: 256,
        ..Default::default()
    };
    pb::Snapshot {
        revision,
        settings: Some(settings),
        shards,
    }
}
