//! Waiting for a state, with a deadline and a name; never for a time.

use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep};

const POLL: Duration = Duration::from_millis(10);

/// Asks until the answer is there; the error says what was waited for and the last reason why not.
///
/// # Errors
/// When the time is over. A question that hangs is cut off then, too.
///
/// # Cancel safety
/// Holds nothing between questions.
pub async fn wait_until<T, E, F>(limit: Duration, what: &str, mut ask: F) -> anyhow::Result<T>
where
    E: std::fmt::Display,
    F: AsyncFnMut() -> Result<T, E>,
{
    let deadline = Instant::now() + limit;
    let mut why = "it was never asked to the end".to_owned();
    loop {
        match tokio::time::timeout_at(deadline, ask()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => why = format!("{error:#}"),
            Err(_) => bail!("waited {limit:?} for {what}; the last question hung (before: {why})"),
        }
        if Instant::now() >= deadline {
            bail!("waited {limit:?} for {what}: {why}");
        }
        sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_error_names_what_was_waited_for_and_why_not() {
        let limit = Duration::from_millis(30);
        let error = wait_until(limit, "the moon", async || Err::<(), _>("cloudy"))
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("for the moon: cloudy"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_question_that_hangs_ends_at_the_deadline() {
        let limit = Duration::from_millis(30);
        let ask = async || -> Result<(), String> { std::future::pending().await };
        assert!(wait_until(limit, "an answer", ask).await.is_err());
    }
}
