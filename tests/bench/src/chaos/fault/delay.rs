//! A host whose packets take long: they go by this program, which keeps each for a while.
//!
//! A link of the switch is moved to a bridge of its own, and each of the two bridges gets a tap, whose
//! frames `socat` hands over as datagrams, so that none of it needs code that the compiler can't check.
//!
//! Invariant: frames keep their order, what waits is bounded by bytes, and the link is back in its
//! place when the detour is dropped.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use slotmesh_harness::wait_until;
use tokio::{
    net::UnixDatagram,
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::super::net::Net;

/// What the kernel may hand over at once.
const FRAME_MAX: usize = 65_600;
/// Frames on their way in one direction; more are lost, as on a real link. At 1,500 bytes each it is
/// 6 MB, or 100 Mbit/s at half a second.
const WAITING_MAX: usize = 4_096;
/// Until `socat` has made its tap.
const TAP_LIMIT: Duration = Duration::from_secs(5);

/// Ends of the detour: the tap on the side of the place, and the one on the side of all others.
const ENDS: [&str; 2] = ["near", "far"];

/// A link that leads through this program.
#[derive(Debug)]
pub(super) struct Detour {
    net: Net,
    port: String,
    dir: PathBuf,
    socats: Vec<Child>,
    relays: JoinSet<()>,
}

impl Detour {
    /// Delays what goes to and from a place, each way by `delay`.
    ///
    /// # Errors
    /// When the kernel or `socat` refuses; then nothing is left of it.
    pub(super) async fn begin(
        net: &Net,
        name: &str,
        dir: &Path,
        delay: Duration,
    ) -> anyhow::Result<Self> {
        let mut detour = Self {
            net: net.clone(),
            port: net.port(name)?,
            dir: dir.join("detour"),
            socats: Vec::new(),
            relays: JoinSet::new(),
        };
        std::fs::create_dir_all(&detour.dir)?;
        detour
            .net
            .within(&["link", "add", "near", "type", "bridge"])?;
        detour.net.within(&["link", "set", "near", "up"])?;
        let mut ends = Vec::new();
        for (end, bridge) in ENDS.into_iter().zip(["near", "br0"]) {
            ends.push(Arc::new(detour.tap(end, bridge).await?));
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let tap = detour.socket_of(ENDS[to]);
            let (from, to) = (ends[from].clone(), ends[to].clone());
            detour.relays.spawn(relay(from, to, tap, delay));
        }
        detour
            .net
            .within(&["link", "set", &detour.port, "master", "near"])?;
        Ok(detour)
    }

    /// Where a tap's frames are sent to.
    fn socket_of(&self, end: &str) -> PathBuf {
        self.dir.join(format!("{end}.tap"))
    }

    /// Makes a tap at a bridge; gives this program's end of it.
    async fn tap(&mut self, end: &str, bridge: &str) -> anyhow::Result<UnixDatagram> {
        let (own, theirs) = (self.dir.join(end), self.socket_of(end));
        for old in [&own, &theirs] {
            let _ = std::fs::remove_file(old);
        }
        let socket = UnixDatagram::bind(&own)?;
        let name = format!("tap-{end}");
        let child = Command::new("ip")
            .args(["netns", "exec", &self.net.switch(), "socat"])
            .args(["-b", &FRAME_MAX.to_string()])
            .arg(format!("TUN,tun-type=tap,tun-name={name},iff-no-pi,iff-up"))
            .arg(format!(
                "UNIX-SENDTO:{},bind={}",
                own.display(),
                theirs.display()
            ))
            .spawn()
            .context("start socat: is it installed?")?;
        self.socats.push(child);
        wait_until(TAP_LIMIT, "socat to make a tap", async || {
            anyhow::ensure!(theirs.exists(), "it has no socket");
            self.net
                .within(&["link", "set", &name, "master", bridge, "up"])
        })
        .await?;
        Ok(socket)
    }
}

impl Drop for Detour {
    fn drop(&mut self) {
        // What fails here shows in the mesh, which then does not become well.
        let _ = self
            .net
            .within(&["link", "set", &self.port, "master", "br0"]);
        // Before the relays, whom they would miss.
        for child in &mut self.socats {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.relays.abort_all();
        let _ = self.net.within(&["link", "del", "near"]);
    }
}

/// Keeps frames from one end for a while, and sends them out at the other.
async fn relay(from: Arc<UnixDatagram>, to: Arc<UnixDatagram>, tap: PathBuf, delay: Duration) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(WAITING_MAX);
    let take = async {
        let mut frame = vec![0; FRAME_MAX];
        while let Ok(length) = from.recv(&mut frame).await {
            let due = Instant::now() + delay;
            // Full: the frame is lost.
            let _ = sender.try_send((due, frame[..length].to_vec()));
        }
    };
    let give = async {
        while let Some((due, frame)) = receiver.recv().await {
            sleep_until(due).await;
            let _ = to.send_to(&frame, &tap).await;
        }
    };
    tokio::join!(take, give);
}
