//! Admission of changes: which parameters and accounts are refused, and with which words.

use slotmesh_proto::instance::v1 as api;
use slotmesh_topology::{
    account::AccountError,
    parameter::{self, ParameterError},
};

use super::{Refusal, RefusalKind, refuse};

/// Checks a request that changes parameters.
///
/// # Errors
/// When it names nothing, too much, or a parameter that can't be set.
pub fn parameter_changes(request: &api::UpdateParametersRequest) -> Result<(), Refusal> {
    let count = request.engine.len() + request.proxy.len();
    if count == 0 {
        return refuse(
            RefusalKind::Invalid,
            "PARAMETERS_INVALID",
            "name parameters in engine or proxy",
        );
    }
    if count > parameter::CHANGES_MAX {
        return Err(parameter_refusal(&ParameterError::TooMany));
    }
    for (name, value) in &request.engine {
        parameter::check_change(name, value).map_err(|error| parameter_refusal(&error))?;
    }
    for (name, value) in &request.proxy {
        parameter::check_proxy(name, value).map_err(|error| parameter_refusal(&error))?;
    }
    Ok(())
}

/// A parameter that is not taken, with its reason for programs.
#[must_use]
pub fn parameter_refusal(error: &ParameterError) -> Refusal {
    let reason = match error {
        ParameterError::Malformed | ParameterError::TooMany => "PARAMETERS_INVALID",
        ParameterError::Reserved(_) => "PARAMETER_RESERVED",
        ParameterError::BootOnly(_) => "PARAMETER_AT_CREATION_ONLY",
        ParameterError::Unknown { .. } => "PARAMETER_UNKNOWN",
        ParameterError::Value { .. } => "PARAMETER_VALUE_INVALID",
    };
    Refusal {
        kind: RefusalKind::Invalid,
        reason,
        message: error.to_string(),
    }
}

/// Accounts that are not taken, with the reason for programs.
#[must_use]
pub fn account_refusal(error: &AccountError) -> Refusal {
    let reason = match error {
        AccountError::PlainPassword(_) => "PASSWORD_IN_CLEAR",
        AccountError::TooMany => "TOO_MANY_ACCOUNTS",
        AccountError::Default => "ACCOUNT_DEFAULT",
        AccountError::Name | AccountError::Twice(_) | AccountError::Rules(_) => "ACCOUNT_INVALID",
    };
    Refusal {
        kind: RefusalKind::Invalid,
        reason,
        message: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_wrong_parameter_has_its_reason() {
        let one = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].into();
        let engine = |name, value| api::UpdateParametersRequest {
            engine: one(name, value),
            ..Default::default()
        };
        let proxy = |name, value| api::UpdateParametersRequest {
            proxy: one(name, value),
            ..Default::default()
        };
        for (request, reason) in [
            (
                api::UpdateParametersRequest::default(),
                "PARAMETERS_INVALID",
            ),
            (engine("h z", "1"), "PARAMETERS_INVALID"),
            (engine("DIR", "/"), "PARAMETER_RESERVED"),
            (
                engine("enable-debug-command", "yes"),
                "PARAMETER_AT_CREATION_ONLY",
            ),
            (proxy("speed", "1"), "PARAMETER_UNKNOWN"),
            (proxy("split", "1"), "PARAMETER_VALUE_INVALID"),
        ] {
            assert_eq!(parameter_changes(&request).unwrap_err().reason, reason);
        }
        assert_eq!(parameter_changes(&engine("save", "")), Ok(()));
        assert_eq!(parameter_changes(&proxy("split", "")), Ok(()));
    }
}
