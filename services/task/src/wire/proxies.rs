//! Records of changes of proxies, what agents report of one, and how the API shows it.

use slotmesh_proto::{agent::v1 as agent, store::v1 as store, task::v1 as api};

use super::process_state;
use crate::{
    observe::{ProxyHandover, ProxyProcess},
    proxies::{Change, Changes, Counted, ProxyPhase, Rebuild, Successor},
};

pub(super) fn from(record: &store::ProxiesSpec) -> Option<Changes> {
    Some(Changes {
        program: record.program.clone(),
        restart: record.restart,
        bake_ms: record.bake_ms,
        in_window: record.in_window,
        rebuild: record.rebuild.as_ref().map(|rebuild| Rebuild {
            host: Some(rebuild.host_id.as_str().into()).filter(|_| !rebuild.host_id.is_empty()),
            drain_ms: rebuild.drain_ms,
        }),
        workers: record.workers,
        paused: record.paused,
        proxies: record
            .proxies
            .iter()
            .map(change_from)
            .collect::<Option<_>>()?,
    })
}

pub(super) fn to(changes: &Changes) -> store::ProxiesSpec {
    store::ProxiesSpec {
        program: changes.program.clone(),
        restart: changes.restart,
        bake_ms: changes.bake_ms,
        in_window: changes.in_window,
        rebuild: changes.rebuild.as_ref().map(|rebuild| store::ProxyRebuild {
            host_id: rebuild
                .host
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            drain_ms: rebuild.drain_ms,
        }),
        workers: changes.workers,
        paused: changes.paused,
        proxies: {
            let one = |part| change_to(part, changes.rebuild.is_some());
            changes.proxies.iter().map(one).collect()
        },
    }
}

fn phase_from(phase: store::ProxyPhase) -> Option<ProxyPhase> {
    Some(match phase {
        store::ProxyPhase::Unspecified => return None,
        store::ProxyPhase::Ready => ProxyPhase::Ready,
        store::ProxyPhase::Check => ProxyPhase::Check,
        store::ProxyPhase::HandOver => ProxyPhase::HandOver,
        store::ProxyPhase::Build => ProxyPhase::Build,
        store::ProxyPhase::Bake => ProxyPhase::Bake,
        store::ProxyPhase::Drain => ProxyPhase::Drain,
        store::ProxyPhase::Back => ProxyPhase::Back,
        store::ProxyPhase::Parked => ProxyPhase::Parked,
        store::ProxyPhase::Done => ProxyPhase::Done,
        store::ProxyPhase::RolledBack => ProxyPhase::RolledBack,
        store::ProxyPhase::Skipped => ProxyPhase::Skipped,
    })
}

fn phase_to(phase: ProxyPhase) -> store::ProxyPhase {
    match phase {
        ProxyPhase::Ready => store::ProxyPhase::Ready,
        ProxyPhase::Check => store::ProxyPhase::Check,
        ProxyPhase::HandOver => store::ProxyPhase::HandOver,
        ProxyPhase::Build => store::ProxyPhase::Build,
        ProxyPhase::Bake => store::ProxyPhase::Bake,
        ProxyPhase::Drain => store::ProxyPhase::Drain,
        ProxyPhase::Back => store::ProxyPhase::Back,
        ProxyPhase::Parked => store::ProxyPhase::Parked,
        ProxyPhase::Done => store::ProxyPhase::Done,
        ProxyPhase::RolledBack => store::ProxyPhase::RolledBack,
        ProxyPhase::Skipped => store::ProxyPhase::Skipped,
    }
}

fn change_from(record: &store::ProxyChange) -> Option<Change> {
    Some(Change {
        proxy: record.proxy_id.as_str().into(),
        host: record.host_id.as_str().into(),
        phase: match record.rebuild_phase() {
            store::ProxyPhase::Unspecified => phase_from(record.phase())?,
            phase => phase_from(phase)?,
        },
        phase_since_ms: record.phase_since_unix_ms,
        message: record.message.clone(),
        from_program: record.from_program.clone(),
        from_generation: record.from_generation,
        from_workers: record.from_workers,
        from_version: record.from_version.clone(),
        to_version: record.to_version.clone(),
        generation: record.generation,
        why_back: Some(record.why_back.clone()).filter(|why| !why.is_empty()),
        on_request: record.on_request,
        before: Counted {
            commands: record.before_commands,
            errors: record.before_errors,
        },
        pid: record.pid,
        handover_us: record.handover_us,
        clients: record.clients,
        finalize: record.finalize,
        bake_since_ms: record.bake_since_unix_ms,
        successor: Some(Successor {
            proxy: record.successor_id.as_str().into(),
            host: record.successor_host_id.as_str().into(),
        })
        .filter(|_| !record.successor_id.is_empty()),
    })
}

fn change_to(part: &Change, is_rebuild: bool) -> store::ProxyChange {
    // An older leader has no such phases, and would begin a restart where it is: to it, the proxy
    // waits for an operator.
    let (phase, rebuild_phase) = match is_rebuild && !part.phase.is_ended() {
        true => (store::ProxyPhase::Parked, phase_to(part.phase)),
        false => (phase_to(part.phase), store::ProxyPhase::Unspecified),
    };
    let successor = part.successor.as_ref();
    store::ProxyChange {
        proxy_id: part.proxy.to_string(),
        host_id: part.host.to_string(),
        phase: phase.into(),
        phase_since_unix_ms: part.phase_since_ms,
        message: part.message.clone(),
        from_program: part.from_program.clone(),
        from_generation: part.from_generation,
        from_workers: part.from_workers,
        from_version: part.from_version.clone(),
        to_version: part.to_version.clone(),
        generation: part.generation,
        why_back: part.why_back.clone().unwrap_or_default(),
        on_request: part.on_request,
        before_commands: part.before.commands,
        before_errors: part.before.errors,
        pid: part.pid,
        handover_us: part.handover_us,
        clients: part.clients,
        finalize: part.finalize,
        bake_since_unix_ms: part.bake_since_ms,
        rebuild_phase: rebuild_phase.into(),
        successor_id: successor.map(|s| s.proxy.to_string()).unwrap_or_default(),
        successor_host_id: successor.map(|s| s.host.to_string()).unwrap_or_default(),
    }
}

#[allow(clippy::cast_precision_loss)] // Milliseconds for people; 2^52 µs is 142 years.
pub(super) fn progress(changes: &Changes) -> Vec<api::ProxyProgress> {
    let one = |part: &Change| api::ProxyProgress {
        proxy_id: part.proxy.to_string(),
        host_id: part.host.to_string(),
        phase: part.phase.name().to_owned(),
        message: part.message.clone(),
        from_version: part.from_version.clone(),
        to_version: part.to_version.clone(),
        handover_ms: part.handover_us as f64 / 1000.0,
        clients: part.clients,
        to_proxy_id: part
            .successor
            .as_ref()
            .map(|s| s.proxy.to_string())
            .unwrap_or_default(),
        to_host_id: part
            .successor
            .as_ref()
            .map(|s| s.host.to_string())
            .unwrap_or_default(),
    };
    changes.proxies.iter().map(one).collect()
}

/// A proxy's process as an agent reports it.
#[must_use]
pub fn process(report: &agent::ProxyReport) -> ProxyProcess {
    let handover = |h: &agent::ProxyHandover| ProxyHandover {
        program: h.program.clone(),
        generation: h.generation,
        is_under_way: matches!(
            h.state(),
            agent::HandoverState::Staging | agent::HandoverState::HandingOver
        ),
        failed: (h.state() == agent::HandoverState::Failed).then(|| h.why.clone()),
        clients: h.clients,
        took_us: h.took_us,
    };
    ProxyProcess {
        state: process_state(report.state()),
        error: report.error.clone(),
        pid: report.pid,
        program: report.program.clone(),
        generation: report.generation,
        version: report.version.clone(),
        handover: report.handover.as_ref().map(handover),
        spare: report.spare_warm.then(|| report.spare_program.clone()),
    }
}
