//! Why a command did not do what was asked, and the exit code that tells a script.
//!
//! Refused and failed are told apart by one rule: a refused request changed nothing and will be
//! refused again until it, or the mesh, is different; anything else failed.

use std::process::ExitCode;

use tonic::Code;
use tonic_types::StatusExt;

/// Exit codes, as `--help` documents them. 2 is clap's own, for a command line that can't be read.
pub const EXIT_FAILED: u8 = 1;
/// See [`EXIT_FAILED`].
pub const EXIT_USAGE: u8 = 2;
/// See [`EXIT_FAILED`].
pub const EXIT_REFUSED: u8 = 3;

/// A command's end other than "done".
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The controller refused the request and changed nothing.
    #[error("refused: {message} [{reason}]")]
    Refused {
        code: Code,
        reason: String,
        message: String,
        metadata: Vec<(String, String)>,
    },
    /// The controller could not do it now.
    #[error("failed: {message} [{reason}]")]
    Failed {
        code: Code,
        reason: String,
        message: String,
    },
    /// No controller answers at this address.
    #[error("no controller answers at {address}")]
    Unreachable {
        address: String,
        source: tonic::transport::Error,
    },
    /// The task ended in another way than Done.
    #[error("task {task_id} ended {state}: {message}")]
    TaskEnded {
        task_id: String,
        state: String,
        message: String,
    },
    /// This command line, on this machine, is refused before anything was changed.
    #[error("refused: {0}")]
    RefusedHere(String),
    /// An argument that only makes sense together with what the mesh says.
    #[error("{0}")]
    Usage(String),
    /// A step on this machine failed: files, processes, sockets.
    #[error(transparent)]
    Local(#[from] anyhow::Error),
}

impl Failure {
    /// Sorts a gRPC status into refused and failed.
    pub fn from_status(status: &tonic::Status) -> Self {
        let info = status.get_details_error_info();
        let reason = info
            .as_ref()
            .map_or_else(|| code_name(status.code()), |i| i.reason.clone());
        let message = if status.message().is_empty() {
            "the controller gave no message".to_owned()
        } else {
            status.message().to_owned()
        };
        let code = status.code();
        if is_refusal(code) {
            let mut metadata: Vec<_> = info
                .map(|i| i.metadata.into_iter().collect())
                .unwrap_or_default();
            metadata.sort();
            Self::Refused {
                code,
                reason,
                message,
                metadata,
            }
        } else {
            Self::Failed {
                code,
                reason,
                message,
            }
        }
    }

    /// The ErrorInfo reason, where a controller gave one.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Refused { reason, .. } | Self::Failed { reason, .. } => Some(reason),
            _ => None,
        }
    }

    /// What the process should exit with.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Refused { .. } | Self::RefusedHere(_) => EXIT_REFUSED,
            Self::Usage(_) => EXIT_USAGE,
            _ => EXIT_FAILED,
        })
    }

    /// One sentence that says what to do next, where there is something to say.
    pub fn next_step(&self) -> Option<String> {
        Some(match self {
            Self::Refused { code: Code::NotFound, .. } => {
                "`slotmesh instance list` and `slotmesh instance describe INSTANCE` show the ids that exist".into()
            }
            Self::Refused { code: Code::InvalidArgument, .. } => {
                "nothing was changed; correct the argument named above and try again".into()
            }
            Self::Refused { code: Code::AlreadyExists | Code::Aborted, .. } => {
                "nothing was changed; a repeat of an earlier request must have the same body, a new request needs a new --client-token; \
                 `slotmesh task list` shows what is under way".into()
            }
            Self::Refused { .. } => {
                "nothing was changed; `slotmesh instance describe INSTANCE` and `slotmesh task list` show the state that stands in the way".into()
            }
            Self::Failed { code: Code::Unavailable | Code::DeadlineExceeded, .. } => {
                "the controller may be electing a leader or restarting; a repeat with the same --client-token is safe".into()
            }
            Self::Failed { .. } => "the controller's log says more".into(),
            Self::Unreachable { .. } => {
                "check --controller (or SLOTMESH_CONTROLLER); `slotmesh up` prints the address on its first lines".into()
            }
            Self::TaskEnded { task_id, state, .. } if state == "needs_operator" => {
                format!("`slotmesh task show {task_id}` says what it waits for")
            }
            Self::TaskEnded { task_id, .. } => {
                format!("`slotmesh task watch {task_id}` shows every step that it took")
            }
            Self::Usage(_) => "`slotmesh --help` shows what each command takes".into(),
            Self::RefusedHere(_) | Self::Local(_) => return None,
        })
    }
}

fn is_refusal(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::NotFound
            | Code::AlreadyExists
            | Code::Aborted
            | Code::OutOfRange
            | Code::PermissionDenied
            | Code::Unauthenticated
    )
}

fn code_name(code: Code) -> String {
    // "FailedPrecondition" as gRPC writes it: FAILED_PRECONDITION.
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn refused(code: Code) -> Failure {
        let details = ErrorDetails::with_error_info("NODE_NOT_REPLICA", "slotmesh", []);
        Failure::from_status(&tonic::Status::with_error_details(
            code,
            "n1 is a primary",
            details,
        ))
    }

    #[test]
    fn a_refusal_is_told_from_a_failure_by_its_exit_code() {
        let code = |failure: Failure| format!("{:?}", failure.exit_code());
        assert_eq!(
            code(refused(Code::FailedPrecondition)),
            code(refused(Code::NotFound))
        );
        assert_ne!(
            code(refused(Code::FailedPrecondition)),
            code(refused(Code::Unavailable))
        );
    }

    #[test]
    fn the_reason_of_the_error_info_is_shown() {
        let shown = refused(Code::FailedPrecondition).to_string();
        assert_eq!(shown, "refused: n1 is a primary [NODE_NOT_REPLICA]");
    }

    #[test]
    fn a_status_without_details_is_named_by_its_code() {
        let failure = Failure::from_status(&tonic::Status::failed_precondition("locked"));
        assert_eq!(failure.to_string(), "refused: locked [FAILED_PRECONDITION]");
    }
}
