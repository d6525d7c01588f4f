//! Records of changes of proxies, what agents report of one, and how the API shows it.

use slotmesh_proto::{agent::v1 as agent, store::v1 as store, task::v1 as api};

use super::process_state;
use crate::{
    observe::{ProxyHandover, ProxyProcess},
    proxies::{Change, Changes, Counted, ProxyPhase},
};

pub(super) fn from(record: &store::ProxiesSpec) -> Option<Changes> {
    Some(Changes {
        program: record.program.clone(),
        restart: record.restart,
        bake_ms: record.bake_ms,
        in_window: record.in_window,
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
        paused: changes.paused,
        proxies: changes.proxies.iter().map(change_to).collect(),
    }
}

fn change_from(record: &store::ProxyChange) -> Option<Change> {
    Some(Change {
        proxy: record.proxy_id.as_str().into(),
        host: record.host_id.as_str().into(),
        phase: match record.phase() {
            store::ProxyPhase::Unspecified => return None,
            store::ProxyPhase::Ready => ProxyPhase::Ready,
            store::ProxyPhase::Check => ProxyPhase::Check,
            store::ProxyPhase::HandOver => ProxyPhase::HandOver,
            store::ProxyPhase::Bake => ProxyPhase::Bake,
            store::ProxyPhase::Back => ProxyPhase::Back,
            store::ProxyPhase::Parked => ProxyPhase::Parked,
            store::ProxyPhase::Done => ProxyPhase::Done,
            store::ProxyPhase::RolledBack => ProxyPhase::RolledBack,
            store::ProxyPhase::Skipped => ProxyPhase::Skipped,
        },
        phase_since_ms: record.phase_since_unix_ms,
        message: record.message.clone(),
        from_program: record.from_program.clone(),
        from_generation: record.from_generation,
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
    })
}

fn change_to(part: &Change) -> store::ProxyChange {
    let phase = match part.phase {
        ProxyPhase::Ready => store::ProxyPhase::Ready,
        ProxyPhase::Check => store::ProxyPhase::Check,
        ProxyPhase::HandOver => store::ProxyPhase::HandOver,
        ProxyPhase::Bake => store::ProxyPhase::Bake,
        ProxyPhase::Back => store::ProxyPhase::Back,
        ProxyPhase::Parked => store::ProxyPhase::Parked,
        ProxyPhase::Done => store::ProxyPhase::Done,
        ProxyPhase::RolledBack => store::ProxyPhase::RolledBack,
        ProxyPhase::Skipped => store::ProxyPhase::Skipped,
    };
    store::ProxyChange {
        proxy_id: part.proxy.to_string(),
        host_id: part.host.to_string(),
        phase: phase.into(),
        phase_since_unix_ms: part.phase_since_ms,
        message: part.message.clone(),
        from_program: part.from_program.clone(),
        from_generation: part.from_generation,
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
