"""The MCP server: tools for agents over the HTTP API, with the caller's own key. ``docs/mcp.md`` has the configuration for hosts."""
