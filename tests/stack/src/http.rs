//! The least HTTP client that can ask whether a service is ready.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// How often a service is asked again.
const POLL: Duration = Duration::from_millis(50);

/// Waits until `GET url` (`http://HOST:PORT/PATH`) answers 200, at most for `limit`.
///
/// # Errors
/// It did not in time; the error holds the last answer.
/// # Cancel safety
/// Dropping the future closes the connection.
pub async fn wait_http_ok(url: &str, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let last = match timeout(Duration::from_secs(5), get(url)).await {
            Ok(Ok(answer)) if answer.split_whitespace().nth(1) == Some("200") => return Ok(()),
            Ok(Ok(answer)) => format!("the last answer was: {answer}"),
            Ok(Err(error)) => format!("the last attempt failed: {error:#}"),
            Err(_) => "the last attempt got no answer in 5 s".to_owned(),
        };
        if Instant::now() >= deadline {
            bail!("{url} did not answer 200 within {limit:?}; {last}");
        }
        sleep(POLL).await;
    }
}

/// The whole answer: status line, headers, body.
async fn get(url: &str) -> Result<String> {
    let address = url
        .strip_prefix("http://")
        .with_context(|| format!("{url} is no http:// URL"))?;
    let (host, path) = address.split_once('/').unwrap_or((address, ""));
    let mut stream = TcpStream::connect(host)
        .await
        .with_context(|| format!("failed to connect to {host}"))?;
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
