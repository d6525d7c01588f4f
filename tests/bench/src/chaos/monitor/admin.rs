//! A connection to a node's admin socket, as its agent has one.
//!
//! Invariant: an answer is read whole before the next question is sent; only lines of MONITOR come
//! unasked, on a connection that is for nothing else.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use prost::Message as _;
use slotmesh_proto::agent::v1::NodeSpec;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

/// As agents call it.
const ADMIN_USER: &str = "slotmesh-admin";
/// CLIENT LIST of a thousand connections is some 400 KB.
const ANSWER_MAX: usize = 64 << 20;

/// A node of the mesh, by its directory.
#[derive(Clone, Debug)]
pub(super) struct NodeFiles {
    dir: PathBuf,
    /// Its name.
    pub(super) node: String,
    /// Of which shard.
    pub(super) shard: String,
}

impl NodeFiles {
    /// Of a directory that an agent has made; `None` while it is not complete.
    pub(super) fn of(dir: &Path) -> Option<Self> {
        let spec = std::fs::read(dir.join("spec")).ok()?;
        let spec = NodeSpec::decode(spec.as_slice()).ok()?;
        Some(Self {
            dir: dir.to_owned(),
            node: dir.file_name()?.to_str()?.to_owned(),
            shard: spec.shard_id,
        })
    }

    /// Whether the node is still assigned to its host.
    pub(super) fn exists(&self) -> bool {
        self.dir.exists()
    }

    /// Opens a connection and logs in.
    ///
    /// # Errors
    /// When no process of the node answers now.
    pub(super) async fn connect(&self) -> anyhow::Result<Admin> {
        let config = std::fs::read_to_string(self.dir.join("redis.conf"))?;
        let socket = config.lines().find_map(|l| l.strip_prefix("unixsocket "));
        let socket = socket.context("the node has no socket yet")?;
        let secret = std::fs::read_to_string(self.dir.join("admin.secret"))?;
        let stream = UnixStream::connect(socket.trim_matches('"')).await?;
        let mut admin = Admin {
            stream: BufReader::new(stream),
        };
        let login = format!("AUTH {ADMIN_USER} {}", secret.trim());
        admin.ask(&login).await?;
        Ok(admin)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Admin {
    stream: BufReader<UnixStream>,
}

impl Admin {
    /// Sends a command and reads its answer, which is one line or one string.
    ///
    /// # Errors
    /// When the connection ends, or the node refuses.
    pub(super) async fn ask(&mut self, command: &str) -> anyhow::Result<String> {
        self.stream.write_all(command.as_bytes()).await?;
        self.stream.write_all(b"\r\n").await?;
        let mut line = String::new();
        if self.stream.read_line(&mut line).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let line = line.trim_end();
        match line.split_at_checked(1) {
            Some(("+", word)) => Ok(word.to_owned()),
            Some(("$", length)) => {
                let length: usize = length.parse()?;
                anyhow::ensure!(length < ANSWER_MAX, "an answer of {length} bytes");
                let mut bytes = vec![0; length + 2];
                self.stream.read_exact(&mut bytes).await?;
                bytes.truncate(length);
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            _ => anyhow::bail!("the node answered {line}"),
        }
    }

    /// The id of the process.
    ///
    /// # Errors
    /// As [`Admin::ask`].
    pub(super) async fn run_id(&mut self) -> anyhow::Result<String> {
        let info = self.ask("INFO server").await?;
        let found = info.lines().find_map(|l| l.strip_prefix("run_id:"));
        Ok(found.context("it has no run_id")?.trim().to_owned())
    }

    /// Whether a proxy could log in.
    ///
    /// # Errors
    /// When the connection ends, or the node answers no list.
    pub(super) async fn has_proxy_user(&mut self) -> anyhow::Result<bool> {
        self.stream.write_all(b"ACL USERS\r\n").await?;
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        let count = line.trim_end().strip_prefix('*');
        let count: usize = count.context("the node lists no users")?.parse()?;
        let mut found = false;
        for _ in 0..2 * count {
            line.clear();
            self.stream.read_line(&mut line).await?;
            found |= line.starts_with("px-");
        }
        Ok(found)
    }

    /// The users of its connections, by their addresses.
    ///
    /// # Errors
    /// As [`Admin::ask`].
    pub(super) async fn users(&mut self) -> anyhow::Result<HashMap<String, String>> {
        let list = self.ask("CLIENT LIST").await?;
        let users = list.lines().filter_map(|line| {
            let field = |name: &str| line.split(' ').find_map(|f| f.strip_prefix(name));
            Some((field("addr=")?.to_owned(), field("user=")?.to_owned()))
        });
        Ok(users.collect())
    }

    /// Reads what comes into `pending`; false at the end.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn read(&mut self, pending: &mut Vec<u8>) -> io::Result<bool> {
        let chunk = self.stream.fill_buf().await?;
        let length = chunk.len();
        pending.extend_from_slice(chunk);
        self.stream.consume(length);
        Ok(length > 0)
    }
}
