//! One trial from its first file to its last.
//!
//! Invariant: the engine that is tried is born a replica of nobody, without a port, and is killed when
//! this ends, however it ends.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr},
    os::unix::process::CommandExt,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use slotmesh_proto::agent::v1::{NodeReport, NodeSpec, StageEngine};
use slotmesh_topology::parameter;
use tokio::{
    process::{Child, Command},
    sync::Semaphore,
    time::sleep,
};

use super::{
    CONFIG, Progress, Scratch,
    copy::{Copied, copy},
};
use crate::{
    artifact::Engine,
    control::{Control, ControlError, strings},
    fence::ADMIN_USER,
    handover::driver::chain,
    host::Host,
    node::{
        data::Boot,
        files::{NodeDir, Place, boot_config, make_private_dir, socket_path},
    },
    probe::Info,
    process::{last_lines, write_atomic},
};

/// Between looks at an engine that starts.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Of its log, when it fails.
const LOG_LINES: usize = 4;

/// See the parent.
pub(super) async fn run(
    host: &Host,
    order: &StageEngine,
    place: &Path,
    turn: &Semaphore,
    progress: &Progress,
) -> Result<(), String> {
    progress.phase("fetch");
    let engine = host.engines.resolve(&order.engine).await;
    let engine = engine.map_err(|error| chain(&error))?;
    progress.tell(|staged| staged.version = engine.version.to_string());
    progress.phase("wait");
    let _turn = turn.acquire().await.map_err(|error| error.to_string())?;
    let dir = NodeDir::create(&host.nodes_dir, &order.node_id);
    let dir = dir.map_err(|e| format!("open the node's directory: {e}"))?;
    super::clear(place);
    make_private_dir(place).map_err(|e| format!("make {}: {e}", place.display()))?;
    let scratch = Scratch(place.to_owned());
    let copied = match order.without_data {
        true => None,
        false => {
            progress.phase("save");
            let mut node = connect(&dir).await?;
            let copied = copy(&mut node, &dir, &scratch.0.join("dump.rdb")).await?;
            progress.tell(|staged| {
                staged.bytes = copied.bytes;
                staged.keys_expected = copied.keys;
            });
            Some(copied)
        }
    };
    progress.phase("load");
    let spec = dir.load_spec().unwrap_or_default();
    let (mut child, socket) = start(&dir, &spec, &engine, &scratch.0)?;
    let tried = check(&mut child, &dir, &socket, &spec, copied, progress).await;
    let ended = child.kill().await;
    if let Err(error) = ended {
        tracing::warn!(node = %order.node_id, %error, "trial not ended");
    }
    tried.map_err(|why| with_log(&why, &scratch.0))
}

async fn connect(dir: &NodeDir) -> Result<Control, String> {
    let secret = dir.admin_secret().map_err(|e| e.to_string())?;
    Control::unix(dir.socket(), ADMIN_USER, &secret)
        .await
        .map_err(|error| format!("the node does not answer: {}", chain(&error)))
}

fn start(
    dir: &NodeDir,
    spec: &NodeSpec,
    engine: &Engine,
    scratch: &Path,
) -> Result<(Child, std::path::PathBuf), String> {
    let prepare = || -> std::io::Result<(Child, std::path::PathBuf)> {
        let socket = socket_path(scratch)?;
        let place = Place {
            ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
            // None: it listens at its socket only.
            port: 0,
            path: scratch,
            socket: &socket,
        };
        let secret = dir.admin_secret()?;
        let text = boot_config(&place, spec, engine.version, &secret, Boot::Resumed);
        let config = scratch.join(CONFIG);
        write_atomic(&config, text.as_bytes(), 0o600)?;
        let output = File::create(scratch.join("redis.out"))?;
        let mut command = std::process::Command::new(&engine.path);
        command
            .arg(&config)
            .current_dir(scratch)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0);
        let mut command = Command::from(command);
        Ok((command.kill_on_drop(true).spawn()?, socket))
    };
    prepare().map_err(|error| format!("start {}: {error}", engine.path.display()))
}

/// Waits until the engine has loaded, and looks at what it has then.
async fn check(
    child: &mut Child,
    dir: &NodeDir,
    socket: &Path,
    spec: &NodeSpec,
    copied: Option<Copied>,
    progress: &Progress,
) -> Result<(), String> {
    let secret = dir.admin_secret().map_err(|e| e.to_string())?;
    let started = Instant::now();
    let (mut control, info) = loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(format!("the engine ended as it started ({status})"));
        }
        if let Ok(mut control) = Control::unix(socket, ADMIN_USER, &secret).await
            && let Ok(info) = Info::read(&mut control, "default").await
            && info.text("loading") == "0"
        {
            break (control, info);
        }
        sleep(LOOK_EVERY).await;
    };
    let took = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut report = NodeReport::default();
    info.fill(&mut report);
    progress.tell(|staged| {
        "check".clone_into(&mut staged.phase);
        staged.version.clone_from(&report.engine_version);
        staged.load_ms = took;
        staged.keys = report.keys;
    });
    if let Some(copied) = copied
        && !copied.is(report.keys)
    {
        return Err(format!(
            "of a copy with {} keys (up to {} more or less) it has loaded {}",
            copied.keys, copied.tolerance, report.keys
        ));
    }
    parameters(&mut control, dir, spec).await
}

/// Whatever the node has and the new engine refuses would be lost silently.
async fn parameters(control: &mut Control, dir: &NodeDir, spec: &NodeSpec) -> Result<(), String> {
    let mut node = None;
    for (name, value) in &spec.parameters {
        let engine_name = parameter::engine_name(name);
        if parameter::is_reserved(&engine_name) || parameter::boot_only_of(&engine_name).is_some() {
            continue;
        }
        let set = control.call(&["CONFIG", "SET", &engine_name, value]).await;
        let words = match set {
            Ok(_) => continue,
            Err(ControlError::Refused(words)) => words,
            Err(error) => return Err(chain(&error)),
        };
        if node.is_none() {
            node = Some(connect(dir).await?);
        }
        // What the node's own engine does not know either is not lost.
        let Some(node) = &mut node else { continue };
        let known = node.call(&["CONFIG", "GET", &engine_name]).await;
        let known = known.map_err(|error| chain(&error))?;
        if !strings(&known).is_empty() {
            return Err(format!("it refuses parameter {name}: {words}"));
        }
    }
    Ok(())
}

fn with_log(why: &str, scratch: &Path) -> String {
    let mut text = last_lines(&scratch.join("redis.log"));
    if text.trim().is_empty() {
        text = last_lines(&scratch.join("redis.out"));
    }
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
    format!("{why}; its log ends: {}", last.join(" / "))
}
